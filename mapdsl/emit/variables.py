"""The local variables of one movement: what they are called, after the tensors' names, and what they hold."""

from __future__ import annotations

import re

from mapdsl.compiler import ir
from mapdsl.emit.rules import RuleEmitter
from mapdsl.language import tree

# Words of a name that say little about the tensor.
_PLAIN_WORDS = ("weight", "bias", "kernel")


class Variables:
    """Variables of a movement from a side: no two alike, and each of one type in all the code of its direction."""

    def __init__(self, emitter: RuleEmitter, source: int) -> None:
        self.e = emitter
        self.source = source
        self._words = set(emitter.words)
        sides = emitter.rule.sides
        # The tensors of each side, and the names of those that are taken.
        self.tensors = {side: [self._tensor(t, side) for t in sides[side]] for side in (0, 1)}
        self.names = [
            self._name(tensor, variable) for tensor, variable in zip(sides[source], self.tensors[source], strict=True)
        ]

    @property
    def is_from_one(self) -> bool:
        """Whether all is made from one tensor, which then may be absent."""
        here = self.e.rule.sides[self.source]
        return len(here) == 1 and not self.e.absorbed(self.source, here[0])

    def view(self, wanted: str) -> str:
        """A variable for a view, for as long as nothing else needs one of that name."""
        return self._fresh(wanted, "Tensor", set(self._words))

    def _tensor(self, tensor: ir.Tensor, side: int) -> str:
        """A variable called by what the name says last."""
        text = "".join(part.text if isinstance(part, tree.Text) else " " for part in tensor.template.parts)
        words = [re.sub(r"\W", "_", word, flags=re.ASCII).strip("_") for word in re.split(r"[.\s]+", text)]
        words = [word for word in words if re.match(r"[A-Za-z]", word)]
        telling = [word for word in words if word not in _PLAIN_WORDS] or words
        wanted = telling[-1] if telling else self.e.context.sides[side]
        if side == self.source:
            return self._fresh(wanted, "Tensor | None" if self.is_from_one else "Tensor")
        many = 0 if self.is_from_one else len(self.e.absorbed(side, tensor))
        return self._fresh(wanted, _by_position(many, "Tensor"))

    def _name(self, tensor: ir.Tensor, variable: str) -> str:
        """A variable for a tensor's name, or for its names by the positions of the axes that they absorb."""
        many = len(self.e.absorbed(self.source, tensor))
        return self._fresh(f"{variable}_names" if many else f"{variable}_name", _by_position(many, "str"))

    def _fresh(self, wanted: str, of_type: str, taken: set[str] | None = None) -> str:
        return self.e.context.variable(wanted, self._words if taken is None else taken, of_type, (self.source,))


def _by_position(axes: int, held: str) -> str:
    """The type of what holds one thing, or a dict of them by the positions of some axes."""
    key = "int" if axes == 1 else f"tuple[{', '.join(['int'] * axes)}]"
    return f"dict[{key}, {held}]" if axes else held
