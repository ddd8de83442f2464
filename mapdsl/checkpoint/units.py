"""Units of a conversion: sets of tensors that have to be converted together, and in no order with others.

They are found by the pass over meta tensors, which is told of every group of tensors that a rule asks for, of every
tensor that comes out of it, and of outputs that are read back. Most units are one group; groups that share a tensor,
a tied one say, are one unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

# The first tensor that a group looks at, and a number: which of the group's new tensors.
Allocation = tuple[str, int]

_SOURCE = "_mapdsl_source"  # an attribute of tensors that come as they are stored


@dataclass
class Units:
    """The unit of every source tensor and of every output, by number; `count` of them.

    `in_place` are outputs that are whole tensors which their group fills: they can be filled where they are to lie.
    `copied` are, by output, stored tensors that come out as they are. `filled_bytes` is, by unit, the memory that one
    of its groups fills which is no output: nought where there is no entry.
    """

    of_source: dict[str, int] = field(default_factory=dict)
    of_output: dict[str, int] = field(default_factory=dict)
    in_place: dict[Allocation, str] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    count: int = 0
    filled_bytes: dict[int, int] = field(default_factory=dict)

    def members(self) -> list[tuple[list[str], list[str]]]:
        """The source tensors and the outputs of each unit."""
        return self._members

    @cached_property
    def _members(self) -> list[tuple[list[str], list[str]]]:
        found: list[tuple[list[str], list[str]]] = [([], []) for _ in range(self.count)]
        for place, numbers in enumerate((self.of_source, self.of_output)):
            for name, unit in numbers.items():
                found[unit][place].append(name)
        return found


class UnitFinder:
    """Told of what happens, in order, it finds the units."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._of_source: dict[str, int] = {}
        self._of_output: dict[str, int] = {}
        self._current: int | None = None
        self._first = ""
        self._allocated: dict[Allocation, Tensor] = {}
        self._in_place: dict[Allocation, str] = {}
        self._copied: dict[str, str] = {}
        self._filled: dict[Allocation, int] = {}

    def begin(self) -> None:
        """A group begins."""
        self._current, self._first = None, ""
        self._allocated.clear()

    def touch(self, name: str) -> None:
        """The group looks at a source tensor."""
        self._first = self._first or name
        known = self._of_source.get(name)
        if known is None or known != self._current:
            self._current = self._of_source[name] = self._joined(known)

    def handed(self, name: str, tensor: Tensor) -> None:
        """The group is given a source tensor."""
        setattr(tensor, _SOURCE, name)

    def allocated(self, tensor: Tensor) -> None:
        """The group has memory to fill."""
        place = self._first, len(self._allocated)
        self._allocated[place] = tensor
        self._filled[place] = tensor.nbytes

    def output(self, name: str, tensor: Tensor) -> None:
        """A tensor comes out."""
        self._current = self._joined(None)
        self._of_output[name] = self._current
        if (source := getattr(tensor, _SOURCE, None)) is not None:
            self._copied[name] = source
        for place, memory in self._allocated.items():
            is_same = tensor is memory or (tensor._base is memory and tensor.dtype == memory.dtype)
            if is_same and tensor.is_contiguous() and tensor.numel() == memory.numel():
                self._in_place[place] = name

    def read_back(self, name: str) -> None:
        """An output is used again."""
        self._current = self._joined(self._of_output[name])

    def finish(self) -> Units:
        """The units, numbered as they came."""
        numbers: dict[int, int] = {}

        def number(unit: int) -> int:
            return numbers.setdefault(self._root(unit), len(numbers))

        of_source = {name: number(unit) for name, unit in self._of_source.items()}
        of_output = {name: number(unit) for name, unit in self._of_output.items()}
        of_group: dict[str, int] = {}
        for place, nbytes in self._filled.items():
            if place not in self._in_place:
                of_group[place[0]] = of_group.get(place[0], 0) + nbytes
        filled: dict[int, int] = {}
        for first, nbytes in of_group.items():
            unit = of_source.get(first, -1)
            filled[unit] = max(filled.get(unit, 0), nbytes)
        return Units(of_source, of_output, self._in_place, self._copied, len(numbers), filled)

    def _joined(self, other: int | None) -> int:
        """The unit at work, one with another if there is one."""
        if self._current is None and other is None:
            self._parents.append(len(self._parents))
            return len(self._parents) - 1
        if self._current is None or other is None:
            return self._root(other if self._current is None else self._current)  # type: ignore[arg-type]
        low, high = sorted((self._root(self._current), self._root(other)))
        self._parents[high] = low
        return low

    def _root(self, unit: int) -> int:
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit
