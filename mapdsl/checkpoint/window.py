"""A checkpoint's tensors for one pass over them: pages that were read leave memory soon after."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.gathering import Pieces
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.checkpoint.units import UnitFinder
from mapdsl.runtime.watched import Form, WatchedState

WINDOW_BYTES = 64 * 2**20
"""How much of what was handed out last is left in memory."""


class Window(LazyState):
    """A `LazyState` that notes which tensors were asked for, and lets go of the pages of all but the last ones.

    Tensors handed out long ago stay good: they are read again when they are used. They must not be written into.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu") -> None:
        super().__init__(checkpoint, device=device)
        self.asked: dict[str, None] = {}
        self._recent: deque[str] = deque()
        self._recent_bytes = 0

    def release_recent(self) -> None:
        """Let go of the pages of the last ones too: of a tensor larger than memory, of which a part has been used."""
        for name in self._recent:
            self.release(name)

    def check_all_whole(self, names: Iterable[str]) -> None:
        """See `check_whole`."""
        for name in names:
            self.check_whole(name)

    def meta(self) -> Window:
        """The same names with meta tensors, noted by themselves."""
        return Window(self.checkpoint, device="meta")

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        self.asked[name] = None
        if not self._is_meta:
            self._note_recent(name)
        return tensor

    def _note_recent(self, name: str) -> None:
        """A tensor is handed out: let go of those before the last ones."""
        self._recent.append(name)
        self._recent_bytes += self.checkpoint.tensors[name].nbytes
        while self._recent_bytes > WINDOW_BYTES and len(self._recent) > 1:
            oldest = self._recent.popleft()
            self._recent_bytes -= self.checkpoint.tensors[oldest].nbytes
            self.release(oldest)


class PlanningWindow(Window, WatchedState):
    """Meta tensors for the pass that plans; what is done with them tells the units."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, device="meta")
        self.units = UnitFinder()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        self.units.handed(name, tensor)
        return tensor

    def begin(self) -> None:
        """See `WatchedState.begin`."""
        self.units.begin()

    def touch(self, name: str) -> None:
        """See `WatchedState.touch`."""
        self.asked[name] = None
        self.units.touch(name)

    def form(self, name: str) -> Form:
        """See `WatchedState.form`."""
        stored = self.checkpoint.tensors[name]
        return stored.dtype, stored.shape

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WatchedState.allocate`."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.units.allocated(tensor)
        return tensor


class WorkingWindow(Window, WatchedState):
    """The tensors of the units that are one worker's own; of all others, meta tensors.

    `is_mine` says it of a source tensor, `at_own` of the group at work; `place` gives memory in the output, where a
    tensor can be filled there; `begins` is told of every group. `asked` are the tensors that were looked at, of all
    units.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        checkpoint: Checkpoint,
        is_mine: Callable[[str], bool],
        place: Callable[[tuple[str, int]], torch.Tensor | None],
        begins: Callable[[], object],
        at_own: Callable[[], bool],
    ) -> None:
        super().__init__(checkpoint)
        self._at_own = at_own
        self._tell_begin = begins
        self._is_mine, self._memory = is_mine, place
        self._others = Window(checkpoint, device="meta")
        self.looked_at: str | None = None  # the first tensor of the group at work
        self._begins, self._allocated = True, 0
        self._unread: dict[int, tuple[torch.Tensor, Pieces]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if not self._is_mine(name):
            return self._others[name]
        pieces = self.pieces(name)
        if pieces is None:
            return super().__getitem__(name)
        # It goes out as it came in: what is handed out stands for it, and has no memory.
        self.asked[name] = None
        self._note_recent(name)
        tensor = torch.empty((), dtype=pieces.dtype).expand(pieces.made.shape)
        self._unread[id(tensor)] = tensor, pieces
        return tensor

    def unread(self, tensor: torch.Tensor) -> Pieces | None:
        """What a tensor that was handed out stands for, if it does; asked once."""
        _, pieces = self._unread.pop(id(tensor), (None, None))
        return pieces

    def begin(self) -> None:
        """See `WatchedState.begin`."""
        self._tell_begin()
        self._begins, self._allocated = True, 0

    def touch(self, name: str) -> None:
        """See `WatchedState.touch`."""
        self.asked[name] = None
        if self._begins:
            self._begins, self.looked_at = False, name

    def form(self, name: str) -> Form | None:
        """See `WatchedState.form`."""
        if self._at_own():
            return None
        stored = self.checkpoint.tensors[name]
        return stored.dtype, stored.shape

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WatchedState.allocate`."""
        number, self._allocated = self._allocated, self._allocated + 1
        memory = None if device.type == "meta" else self._memory((self.looked_at or "", number))
        return torch.empty(shape, dtype=dtype, device=device) if memory is None else memory.view(shape)
