"""Commands that a launcher such as torchrun has started several times: what is told, is told once."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mapdsl.cli.interrupts import exit_status
from mapdsl.cli.output import complain

if TYPE_CHECKING:
    from mapdsl.checkpoint.ranks import Ranks

SHARED = ("convert",)
"""Commands that several ranks share."""

_NOTICE_SECONDS = 10.0


def is_spare(environment: Mapping[str, str], command: str = "") -> bool:
    """Whether torchrun started this process as another rank than the first, which has nothing of its own to do or say.

    Without a command: to say.
    """
    # Only torchrun's own: a shell in which somebody has set RANK for something else is no rank.
    is_other = environment.get("TORCHELASTIC_RUN_ID") is not None and environment.get("RANK", "0") != "0"
    return is_other and command not in SHARED


@contextlib.contextmanager
def mute_where_spare(environment: Mapping[str, str]) -> Iterator[None]:
    """Usage errors and --help are the same on all ranks: let the first print them."""
    if not is_spare(environment):
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def ranks_of_launcher(destination: str) -> Iterator[Ranks | None]:
    """The ranks that were started together; None where this process is alone.

    What goes wrong in the block ends all of them, and passes on the rank that is to tell of it. The others end without
    a word: SystemExit.
    """
    from mapdsl.checkpoint.ranks import OtherRankError, join_ranks, world_size

    count = world_size(os.environ)
    notice = threading.Timer(_NOTICE_SECONDS, _tell_waiting, (count,))
    notice.daemon = True
    if count > 1 and os.environ.get("RANK") == "0":
        notice.start()
    try:
        ranks = join_ranks()
    finally:
        notice.cancel()
    if ranks is None:
        yield None
        return
    try:
        with ranks.together():
            yield ranks
    except OtherRankError:
        from mapdsl.checkpoint.journal import partial_folder

        if not ranks.rank and partial_folder(Path(destination)).exists():
            complain("stopped: what is done is kept. The same command with --resume goes on, with any number of ranks")
        sys.exit(1)
    except KeyboardInterrupt as problem:  # a launcher sends it to all
        if ranks.rank:
            sys.exit(exit_status(problem))
        raise
    except Exception:
        if not ranks.tells():
            sys.exit(1)
        if ranks.rank:
            complain(f"rank {ranks.rank} of {ranks.count}, on {socket.gethostname()}:")
        raise
    finally:
        ranks.close()


def _tell_waiting(count: int) -> None:
    complain(f"waiting for the other ranks of {count} (WORLD_SIZE); unset it to convert in one process")
