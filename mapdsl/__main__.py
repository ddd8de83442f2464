"""`python -m mapdsl`."""

from __future__ import annotations

import sys

from mapdsl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
