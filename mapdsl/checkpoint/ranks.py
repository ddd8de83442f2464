"""Several processes, on one machine or more, at one conversion: how they tell each other things, and stop together.

A launcher such as torchrun starts them and says to each, in its environment, which rank it is. They talk through
torch's key-value store; there is no process group, and nothing times out while every rank is heard of.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Protocol

from mapdsl.checkpoint.processes import has_ended, node_name, process_name
from mapdsl.language.diagnostics import MapError, error

BEAT_SECONDS = 1.0
"""How often a rank says that it is there."""

LOST_SECONDS = 300.0
"""A rank that was not heard of for so long is lost."""

_JOIN = timedelta(minutes=10)  # for all ranks to start
_LEAVING_SECONDS = 10.0  # for all ranks to stop, or to hear that all is done
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KILLED = "it was killed, for want of memory perhaps, or a file that it read was cut meanwhile (a bus error)"
_RESUME = "what is done is kept: the same command with --resume goes on, with any number of ranks"


class Store(Protocol):
    """What is used of torch's `Store`."""

    def set(self, key: str, value: str) -> None:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """A key's value; waits for it."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, at first 0; gives the sum."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of the keys are set."""


class OtherRankError(Exception):
    """Another rank failed, and tells of it: this one has only to stop. `may_go_on` says if a later run is of use."""

    def __init__(self, *, may_go_on: bool) -> None:
        super().__init__("another rank failed")
        self.may_go_on = may_go_on


def may_go_on(problem: BaseException | None) -> bool:
    """Whether a later run can go on where this problem ended one: an interrupt, a failure of a disk or of a rank.

    An error of the map or of the data would come again.
    """
    if isinstance(problem, OtherRankError):
        return problem.may_go_on
    return not isinstance(problem, Exception) or (
        isinstance(problem, MapError) and isinstance(problem.__cause__, OSError)
    )


def world_size(environment: Mapping[str, str]) -> int:
    """How many ranks a launcher has started; 1 where none says so."""
    size = environment.get("WORLD_SIZE", "")
    return int(size) if all(environment.get(name) for name in _NEEDED) and size.isdecimal() else 1


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks | None]:
    """The ranks that a launcher has started, for a block: the failure of one ends it for all. See `join_ranks`."""
    ranks = join_ranks()
    if ranks is None:
        yield None
        return
    try:
        with ranks.together():
            yield ranks
    finally:
        ranks.close()


def join_ranks(environment: Mapping[str, str] | None = None) -> Ranks | None:
    """The ranks that a launcher has started, this process one of them; None where it is alone.

    Waits for all of them to come. Raises a MapError, C507, where they do not.
    """
    environment = os.environ if environment is None else environment
    count = world_size(environment)
    if count < 2:
        return None
    # Not for a process that is alone: some builds of torch do without.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    try:
        rank = int(environment["RANK"])
        store, _, _ = next(rendezvous("env://", rank, count, timeout=_JOIN))
    except (RuntimeError, ValueError) as problem:
        message = f"the {count} ranks of this job cannot meet at {where}: {str(problem).splitlines()[0]}"
        advice = "start all of them (torchrun does), or unset WORLD_SIZE to convert in one process"
        raise error("C507", message, subject="ranks", help=advice) from problem
    return Ranks(PrefixStore("mapdsl", store), rank, count)


class Ranks:
    """This process among those that convert one checkpoint: rank `rank` of `count`.

    `stop` is set as soon as another rank fails or is lost; `check`, and whatever waits, raises then.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.nodes: list[str] = []
        """The machine of each rank; known when all have agreed."""
        self.stop = threading.Event()
        self.heard: Callable[[int], object] = lambda nbytes: None
        """On the first rank, told of the bytes that the others have written since."""
        self._store = store
        self._problem: Exception | None = None
        self._bytes, self._name = 0, process_name()
        self._lock = threading.Lock()
        self._beats: dict[int, tuple[str, float]] = {}  # what each said last, and when it was new
        self._heard: dict[int, int] = {}
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="mapdsl-ranks", daemon=True)
        self._watcher.start()

    # --- telling each other ------------------------------------------------------------------------------------------

    def send(self, what: str, value: str = "") -> None:
        """Tell the first rank something."""
        with self._reaching():
            self._store.set(f"{what}/{self.rank}", value)

    def collect(self, what: str) -> list[str]:
        """What each of the other ranks sends, in their order."""
        return [self._wait(f"{what}/{rank}") for rank in range(1, self.count)]

    def hand_out(self, what: str, values: Sequence[str]) -> None:
        """Tell each of the other ranks something."""
        with self._reaching():
            for rank, value in enumerate(values, start=1):
                self._store.set(f"{what}/for/{rank}", value)

    def receive(self, what: str) -> str:
        """What the first rank tells this one."""
        return self._wait(f"{what}/for/{self.rank}")

    def tell_bytes(self, nbytes: int) -> None:
        """How much this rank has written so far; the first rank hears of it soon."""
        self._bytes = nbytes

    def hear_all(self, sizes: Sequence[int]) -> None:
        """How much each of the other ranks has written in the end."""
        for rank, nbytes in enumerate(sizes, start=1):
            self._hear(rank, nbytes)

    def agree(self, identity: Mapping[str, str]) -> None:
        """Make sure that all ranks are to convert the same thing, in the same way; C507 on the first rank if not."""
        node = node_name()
        if self.rank:
            self.send("identity", json.dumps({"node": node, "identity": dict(identity)}))
            self.nodes = json.loads(self.receive("nodes"))
            return
        with self._reaching():
            self._store.set("planned", "")  # so far nothing is wrong: see `tells`
        others = [json.loads(text) for text in self.collect("identity")]
        for rank, other in enumerate(others, start=1):
            theirs = other["identity"]
            if differing := [what for what in identity if theirs.get(what) != identity[what]]:
                message = f"rank {rank} has another conversion to do than rank 0: {' and '.join(differing)} differs"
                advice = "give all ranks the same command, and the same files at the same paths"
                raise error("C507", message, subject="ranks", help=advice)
        self.nodes = [node, *(str(other["node"]) for other in others)]
        self.hand_out("nodes", [json.dumps(self.nodes)] * len(others))

    # --- stopping together -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what has happened to another rank, if anything has."""
        if self.stop.is_set() and self._problem is not None:
            raise self._problem

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks come to the end of this, or all are stopped by the one that fails."""
        try:
            yield
        except BaseException as problem:
            self.fail(problem)
            with contextlib.suppress(RuntimeError):
                self._store.set(f"left/{self.rank}", "")
            raise
        self._say_goodbye()

    def fail(self, problem: BaseException | None = None) -> None:
        """Have the other ranks stop, because of a problem or an interrupt."""
        with contextlib.suppress(RuntimeError):  # the store may be gone, too
            if not self._store.check(["failed"]):
                self._store.set("failed", "may go on" if may_go_on(problem) else "")

    def stop_others(self) -> None:
        """Have the other ranks stop, and wait until they have, for a while."""
        self.fail()
        with contextlib.suppress(RuntimeError):
            self._wait_a_while(self._have_left)

    def tells(self) -> bool:
        """Whether this rank is the one to tell of its failure: the first that asks is.

        Before there is anything to convert the ranks find the same errors; then it is rank 0.
        """
        try:
            if self.rank and not self._store.check([f"identity/{self.rank}"]):
                self._wait_a_while(lambda: self._store.check(["told"]) or self._store.check(["planned"]))
            return self._store.add("told", 1) == 1
        except RuntimeError:
            return True

    def close(self) -> None:
        """Tell and hear no more."""
        self._ended.set()
        self._watcher.join()

    def _say_goodbye(self) -> None:
        """The first rank may host the store: it goes last."""
        with contextlib.suppress(RuntimeError):  # all is done: who is gone already needs no farewell
            self._store.set(f"left/{self.rank}", "")
            if not self.rank:
                self._wait_a_while(self._have_left)

    def _have_left(self) -> bool:
        return self._store.check([f"left/{rank}" for rank in range(1, self.count)])

    def _wait_a_while(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + _LEAVING_SECONDS
        while time.monotonic() < end and not is_so():
            time.sleep(0.02)

    def _wait(self, key: str) -> str:
        pause = 0.01
        while True:
            with self._reaching():
                if self._store.check([key]):
                    return self._store.get(key).decode("utf-8")
            self.check()
            self.stop.wait(pause)
            pause = min(2 * pause, 0.5)

    def _watch(self) -> None:
        """Say that this rank is there, and listen for the others."""
        number = 0
        while not self._ended.is_set():
            number += 1
            try:
                self._store.set(f"beat/{self.rank}", f"{number} {self._bytes} {self._name}")
                if self._store.check(["failed"]):
                    self._stop(OtherRankError(may_go_on=bool(self._store.get("failed"))))
                    return
                self._listen()
            except Exception as problem:  # whatever it is: who waits asks nobody but this thread whether all is well
                self._stop(self._unreachable(problem))
                return
            self._ended.wait(BEAT_SECONDS)

    def _listen(self) -> None:
        """The first rank hears of all others, these hear of the first."""
        now = time.monotonic()
        for rank in range(1, self.count) if not self.rank else (0,):
            said = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else "0 0 "
            last, since = self._beats.get(rank, ("", now))
            if said != last:
                self._beats[rank] = (said, now)
                self._hear(rank, int(said.split()[1]))
            elif has_ended(said.split(" ", 2)[2]) and not self._store.check([f"left/{rank}"]):
                self._store.set(f"left/{rank}", "")  # nobody need wait for it
                self._lose(rank, f"the process of rank {rank} has ended, and did not say why", f"{_KILLED}\n{_RESUME}")
            elif now - since > LOST_SECONDS:
                self._lose(rank, f"rank {rank} was not heard of for {LOST_SECONDS:.0f} seconds", _RESUME)

    def _lose(self, rank: int, message: str, advice: str) -> None:
        self.fail()
        self._stop(_lost(rank, message, advice))

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as problem:
            raise self._unreachable(problem)  # noqa: B904 (it has its cause)

    def _hear(self, rank: int, nbytes: int) -> None:
        with self._lock:
            count = nbytes - self._heard.get(rank, 0)
            if count > 0:
                self._heard[rank] = nbytes
                self.heard(count)

    def _stop(self, problem: Exception) -> None:
        self._problem = self._problem or problem  # the first one tells why; that all are to stop comes of it
        self.stop.set()

    def _unreachable(self, problem: Exception) -> MapError:
        return _lost(self.rank, f"rank {self.rank} has lost the others: {(str(problem).splitlines() or [''])[0]}")


def _lost(rank: int, message: str, advice: str = _RESUME) -> MapError:
    problem = error("C507", message, subject=f"rank {rank}", help=advice)
    problem.__cause__ = ConnectionError(message)  # no error of the data: see `may_go_on`
    return problem
