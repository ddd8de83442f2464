"""Random rules that obey the law of shapes: axes dealt out over names and shapes of both sides, grouped and cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import strategies as st

# Axes by kind: free ones have their sizes from the tensors, params from the config, indices may live in names.
FREE = {"a": 2, "b": 3, "c": 5}
PARAMS = {"P": 2, "Q": 3, "R": 4}
INDICES = {"e": 2, "i": 3, "k": 2}
LOWER = {"k": 1}
ENUMS = {"j": ("w1", "w2"), "m": ("x", "y", "z")}


@dataclass(frozen=True)
class RandomTensor:
    """One tensor: the axes in its name, its dimensions, each a text."""

    stem: str
    named: tuple[str, ...]
    dims: tuple[str, ...]

    def text(self, side: str) -> str:
        holes = "".join(
            f".{{{axis}}}" if axis in INDICES else f".{{{axis}:{_spelled(axis, side)}}}" for axis in self.named
        )
        return f"{self.stem}{holes} [{' '.join(self.dims)}]"


@dataclass(frozen=True)
class RandomRule:
    """A rule, as the tensors of its two sides."""

    left: tuple[RandomTensor, ...]
    right: tuple[RandomTensor, ...]

    def text(self) -> str:
        sides = (" + ".join(t.text(side) for t in tensors) for side, tensors in (("l", self.left), ("r", self.right)))
        declared = [f"param {name}" for name in PARAMS]
        declared += [f"param n_{name}" for name in INDICES]
        declared += [f"index {LOWER.get(n, 0)} <= {n} < n_{n}" if n in LOWER else f"index {n} < n_{n}" for n in INDICES]
        return "\n".join([*declared, " <-> ".join(sides)]) + "\n"


CONFIG = {**PARAMS, **{f"n_{name}": size + LOWER.get(name, 0) for name, size in INDICES.items()}}


def _spelled(axis: str, side: str) -> str:
    return "|".join(side + word for word in ENUMS[axis])


def _grouped(draw: st.DrawFn, axes: list[str]) -> tuple[str, ...]:
    """Axes in some order, neighbours put together at random; at most one of unknown size in a dimension."""
    axes = draw(st.permutations(axes))
    dims: list[list[str]] = []
    for axis in axes:
        crowded = bool(dims) and axis in FREE and any(a in FREE for a in dims[-1])
        if dims and not crowded and draw(st.booleans()):
            dims[-1].append(axis)
        else:
            dims.append([axis])
    words = [d[0] if len(d) == 1 else f"({' '.join(d)})" for d in dims]
    if draw(st.integers(0, 5)) == 0:
        words.insert(draw(st.integers(0, len(words))), "1")
    return tuple(words)


@st.composite
def moves(draw: st.DrawFn) -> RandomRule:
    """One tensor a side and match: axes in names and shapes of both sides, in any order and grouping."""
    axes = draw(st.lists(st.sampled_from([*FREE, *PARAMS, *INDICES, *ENUMS]), min_size=1, max_size=5, unique=True))
    nameable = [axis for axis in axes if axis in INDICES or axis in ENUMS]
    sides: list[tuple[str, list[str], list[str]]] = []
    for stem in ("left", "right"):
        named = [axis for axis in nameable if draw(st.booleans())]
        if stem == "right":  # an enumeration is spelled out in one name at least
            named += [axis for axis in axes if axis in ENUMS and axis not in (*sides[0][1], *named)]
        sides.append((stem, draw(st.permutations(named)), [axis for axis in axes if axis not in named]))
    tensors = []
    for stem, named, shaped in sides:
        tensors.append(RandomTensor(stem, tuple(named), _grouped(draw, shaped)))
    return RandomRule((tensors[0],), (tensors[1],))


@st.composite
def joins(draw: st.DrawFn) -> RandomRule:
    """Several tensors on the left, joined along one dimension of one on the right, or cut another way."""
    common = draw(st.lists(st.sampled_from(["a", "Q", "e", "j"]), max_size=3, unique=True))
    absorbed = [axis for axis in common if axis == "j" or (axis == "e" and draw(st.booleans()))]
    outer = [axis for axis in common if axis not in absorbed and axis != "a" and draw(st.booleans())]
    rest = [axis for axis in common if axis not in absorbed and axis not in outer]
    count = draw(st.integers(2, 3))
    terms = [draw(st.sampled_from([["b"], ["P"], ["R", "b"], ["b", "P"], ["R"]])) for _ in range(count)]
    left = []
    for number, term in enumerate(terms):
        left.append(RandomTensor(f"t{number}", tuple(absorbed), _grouped(draw, [*outer, *term, *rest])))
    cut = " + ".join(" ".join(term) for term in terms)
    joined = f"({' '.join(outer)} ({cut}))" if outer else f"({cut})"
    others = [f"{axis}" for axis in [*rest, *absorbed]]
    right = draw(st.permutations([joined, *others]))
    rule = RandomRule(tuple(left), (RandomTensor("joined", (), tuple(right)),))
    if draw(st.booleans()):
        # One joined form to another: the terms side by side instead of under the outer axes.
        flat = " + ".join(" ".join([*outer, *term]) for term in terms)
        dims = draw(st.permutations([f"({flat})", *rest]))
        rule = replace(rule, left=(RandomTensor("side_by_side", tuple(absorbed), tuple(dims)),))
    return rule


@st.composite
def broken(draw: st.DrawFn) -> tuple[RandomRule, str]:
    """A rule with one axis lost, doubled, or a term too many."""
    rule = draw(st.one_of(moves(), joins()))
    side = draw(st.sampled_from(["left", "right"]))
    tensors = list(getattr(rule, side))
    place = draw(st.integers(0, len(tensors) - 1))
    tensor = tensors[place]
    what = draw(st.sampled_from(["lost", "twice", "sum"]))
    if what == "lost":
        tensors[place] = replace(tensor, dims=(*tensor.dims, "other"))
    elif what == "twice":
        axis = draw(st.sampled_from(["a", "Q", "e"]))
        tensors[place] = replace(tensor, dims=(*tensor.dims, axis, axis))
    else:
        tensors[place] = replace(tensor, dims=(*tensor.dims, "(P + Q)"))
    return replace(rule, **{side: tuple(tensors)}), what
