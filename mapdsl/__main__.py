"""The command `mapdsl`, which is `python -m mapdsl` too."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command that was typed; see `mapdsl.cli.main`."""
    # Until the command heeds signals, Ctrl-C just ends the process: what it would interrupt are imports.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mapdsl.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
