"""What a conversion would make, and what it lacks, by name: run over a state without a look at any element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from mapdsl.runtime.adapter import Adapter, naming_the_rule, refuse
from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import Alternatives
from mapdsl.runtime.fitting import Pattern
from mapdsl.runtime.group import has_no_elements
from mapdsl.runtime.put import Put
from mapdsl.runtime.sizes import Size, counted
from mapdsl.runtime.stored_forms import AS_IS, NOT_AT_ALL
from mapdsl.runtime.take import Operand
from mapdsl.runtime.traced import Blank
from mapdsl.runtime.tracing import Source, Trace, TracingTake


def left_names_of(adapter: Adapter, state: Mapping[str, Tensor], *, quantization: bool = False) -> list[str]:
    """The names of the left tensors that a right state, or a part of one, makes, in the order in which it makes them.

    Raises ConversionError where the state does not fit the map: R605 for a part of a group.
    """
    adapter.complement.right.clear()
    adapter.set_params(adapter.config)
    found = Trace()
    take = _Naming(found, state, partial=True, entries=adapter.complement.right)
    put = _Names(quantization=quantization, entries=adapter.complement.entries, source=take)
    with naming_the_rule():
        adapter._to_left(take, put)
    take.refuse_lacking()
    take.finish()
    return put.names


def lacking(adapter: Adapter, state: Mapping[str, Tensor], *, partial: bool) -> list[str]:
    """The left names that a left state lacks; with `partial` groups that are absent whole are not missed."""
    adapter.complement.clear()
    adapter.set_params(adapter.config)
    found = Trace(spelled=adapter.complement.spelled)
    take = _Looking(found, state, partial=partial, spelled=found.spelled)
    put = _Names(source=take)
    with naming_the_rule():
        adapter.accept(take)
        adapter._to_right(take, put)
    return list(found.lacking)


class _Naming(TracingTake):
    """Hands out blanks."""

    def _note(self, source: Source) -> Tensor:
        return cast(Tensor, Blank(source.shape))

    def empty(self, *shape: int) -> Tensor:
        """A blank of a shape."""
        return cast(Tensor, Blank(shape))

    zeros = empty

    def into(self, view: Tensor, name: str, *, copy: bool | None = None) -> None:
        """Take a tensor of the group at hand."""
        del view, copy
        self.part(name)


class _Looking(TracingTake):
    """Hands out nothing: looks whether groups are there."""

    def __call__(
        self,
        name: str,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        into: Alternatives = NOT_AT_ALL,
        **sizes: Size,
    ) -> Tensor | None:
        """Look for one tensor."""
        del into
        if not (stored is AS_IS and name in self):
            self._look([([name], shape, stored)], optional, sizes)
        return None

    def group(self, *operands: Operand, optional: bool = False, into: Alternatives = NOT_AT_ALL, **sizes: Size) -> bool:
        """Look for the tensors of a group."""
        del into
        whole: list[tuple[list[str], Pattern | None, Alternatives]] = []
        for names, shape, *rest in operands:
            listed = [names] if isinstance(names, str) else list(names)
            whole.append((listed, shape, rest[0] if rest else AS_IS))
        self._look(whole, optional, sizes)
        return False

    def _look(
        self,
        operands: list[tuple[list[str], Pattern | None, Alternatives]],
        optional: bool,
        sizes: Mapping[str, Size],
    ) -> None:
        """Note what is missed of a group."""
        absent = [
            name
            for names, _, stored in operands
            for name in names
            if name not in self and not self._elsewhere(name, stored)
        ]
        if not absent:
            return
        shapes = [shape for _, shape, _ in operands if isinstance(shape, tuple)]
        may_be_absent = optional or self.partial or has_no_elements(shapes, counted(sizes))
        if len(absent) < sum(len(names) for names, _, _ in operands) or not may_be_absent:
            self.found.lacking |= dict.fromkeys(absent)


class _Names(Put):
    """Notes names alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(refuse, refuse, **options)
        self.names: list[str] = []

    def __call__(self, name: str, tensor: Tensor | None, stored: Alternatives = AS_IS) -> None:
        """Note the names of a tensor."""
        if tensor is None:
            return
        codec = self.alternative(name, stored)
        self.names += codec.names(name) if isinstance(codec, Codec) else [name]

    part = __call__  # type: ignore[assignment]

    def own(self, *names: str, but: Any = ()) -> None:
        """Nothing is carried."""

    def full(self, name: str, shape: tuple[int, ...], value: float, stored: Alternatives = AS_IS) -> None:
        """Note a constant."""
        del shape, value
        self(name, cast(Tensor, Blank(())), self._unread(name, stored))

    def tie(self, name: str, other: str, stored: Alternatives = AS_IS) -> None:
        """Note a tensor that equals another."""
        if other in self.names:
            self(name, cast(Tensor, Blank(())), stored)


__all__ = ["lacking", "left_names_of"]
