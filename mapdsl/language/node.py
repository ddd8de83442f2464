"""The base of all nodes of the syntax tree, and the decorator that makes a class one.

Nodes are dataclasses that cannot be changed and are equal where they say the same. Their methods are here, once:
`dataclass(frozen=True)` would compile six of them for each class, which for forty classes is a tenth of a `check`.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mapdsl.language.source import Span

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        """What tells a type checker that `node` makes dataclasses tells nothing at run time."""
        return lambda decorator: decorator


Class = TypeVar("Class")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def node(cls: type[Class]) -> type[Class]:
    """Make a class a node: its annotations are the fields, those of its bases first."""
    return dataclass(init=False, repr=False, eq=False)(cls)


def _fields(value: Any) -> tuple[str, ...]:
    """The fields that make a node what it is: all but the span, which is given by its name only."""
    return value.__match_args__  # type: ignore[no-any-return]


def _content(value: Any) -> tuple[Any, ...]:
    return tuple([getattr(value, name) for name in _fields(value)])


@node
class Node:
    """Base of all nodes; `span` is where the node stands in its file."""

    span: Span = field(kw_only=True)

    if not TYPE_CHECKING:  # a type checker knows a dataclass's own

        def __init__(self, *values: Any, **named: Any) -> None:
            self.__dict__.update(zip(_fields(self), values, strict=False), **named)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return other is self or _content(self) == _content(other)

    def __hash__(self) -> int:
        return hash((type(self), *_content(self)))

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name in _fields(self)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete field {name!r}")
