"""What holds for maps with a mesh, over any numbers of ranks. Each property raises PropertyError where it breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mapdsl.runtime.codecs.storage import BlockStorage, Storage
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.shares import Ranks
from mapdsl.testing.bits import bits
from mapdsl.testing.comparing import PropertyError, compare, same_names
from mapdsl.testing.cuts import Cuts, Shares, telling, told
from mapdsl.testing.formats import runtime_codec
from mapdsl.testing.shares import PADDING, Held, Reading
from mapdsl.testing.states import SIDES, State, made_anyway

if TYPE_CHECKING:
    from mapdsl.testing.suite import Example

_REFUSALS = 4
Made = Mapping[str, Tensor]


# --- the properties ---------------------------------------------------------------------------------------------------


def split_and_merged(example: Example) -> None:
    """Each rank holds what its axes say of the left and of the right, and merging gives back every byte."""
    for side in SIDES:
        _smallest_first(example, side, "split", _split_and_merged)


def resharded(example: Example) -> None:
    """From some ranks to others, on the left and on the right: every byte that splitting the whole gives."""
    cuts = example.cuts
    for side in SIDES:
        readings = [one for one in cuts.cuttable(side) if len(one.places) > 1]
        sources = [one for one in readings if cuts.tells(one, side)]
        pairs = [(one, other) for one in sources for other in readings if one is not other]
        pairs.sort(key=_places)
        for one, other in cuts.some(pairs, _places, side, "pairs"):
            _resharded(cuts, one, other, side)


def rank_by_rank(example: Example) -> None:
    """What a rank holds of the left becomes what it holds of the right, and back, with nothing of other ranks."""
    fine = [reading for reading in example.cuts.fine if not example.cuts.may_cut_blocks(reading)]
    for side in SIDES:
        _smallest_first(example, side, "convert", _commutes, fine)


def ranks_agree(example: Example) -> None:
    """Merging refuses ranks that differ in what several hold (R602), lack a tensor (R605), or have one more (R603)."""
    for side in SIDES:
        _smallest_first(example, side, "agree", _agree)


def cuts_refused(example: Example) -> None:
    """Over ranks that do not divide an axis (P453), or cut a block of a format (P454), nothing is split."""
    cuts = example.cuts
    for side in SIDES:
        axes = {n: sorted({p.axis for p in cuts.uneven(one, side)}) for n, one in enumerate(cuts.readings)}
        for reading in [cuts.readings[number] for number in _each_alone(example, axes)]:
            words = [
                [f"`{p.axis}` has {p.size:,} positions", f"{p.count} ranks of `{p.mesh}`"] for p in cuts.uneven(reading)
            ]
            with telling(reading.ranks, side):
                _refused(cuts, reading, side, "P453", words)
        tensors = {n: cuts.cut_blocks(one, side) for n, one in enumerate(cuts.fine)}
        for reading in [cuts.fine[number] for number in _each_alone(example, tensors)]:
            with telling(reading.ranks, side):
                _refused(cuts, reading, side, "P454", [[name] for name in tensors[cuts.fine.index(reading)]])


RANK_PROPERTIES: dict[str, Callable[[Example], None]] = {
    function.__name__: function for function in (split_and_merged, resharded, rank_by_rank, ranks_agree, cuts_refused)
}

# --- over which ranks -------------------------------------------------------------------------------------------------


def _smallest_first(
    example: Example,
    side: str,
    what: str,
    check: Callable[[Cuts, Reading, str], None],
    readings: list[Reading] | None = None,
) -> None:
    """Check some numbers of ranks; where one fails, the fewest that fail are told."""
    cuts = example.cuts
    readings = [one for one in (cuts.cuttable(side) if readings is None else readings) if len(one.places) > 1]
    for reading in cuts.some(readings, lambda one: len(one.places), side, what):
        try:
            with telling(reading.ranks, side):
                check(cuts, reading, side)
        except PropertyError:
            for smaller in readings[: readings.index(reading)]:
                with telling(smaller.ranks, side):
                    check(cuts, smaller, side)
            raise


def _places(pair: tuple[Reading, Reading]) -> int:
    return len(pair[0].places) + len(pair[1].places)


def _each_alone(example: Example, found: Mapping[int, list[str]]) -> list[int]:
    """For some of the names found, the first number under which as few others are found as may be."""
    names = sorted({name for listed in found.values() for name in listed})
    chosen = Random(f"refused {example.seed}").sample(names, min(_REFUSALS, len(names)))
    best = (min((n for n in found if name in found[n]), key=lambda n: len(found[n])) for name in chosen)
    return sorted(set(best))


# --- how they hold ----------------------------------------------------------------------------------------------------


def _split_and_merged(cuts: Cuts, reading: Reading, side: str) -> None:
    shares, name = cuts.shares(reading, side), cuts.names[side]
    for place, share in zip(reading.places, shares, strict=True):
        _is_share(cuts, reading, side, place, share)
    if not cuts.tells(reading, side):
        _refuses_to_merge(cuts, reading, side, shares, ("X304",), ())
        return
    whole = cuts.state(side).canonical
    for states in (shares, _with_padding_filled(cuts, reading, side, shares)):
        merged = cuts.adapter.merge(states, reading.ranks, side=name)
        _same(merged, whole, "merging")
    # The merged state is the whole to the byte, so one rank stands for all.
    again = cuts.adapter.shard(merged, reading.ranks, reading.places[-1], side=name)
    _same(again, shares[-1], f"splitting again, rank {told(reading.places[-1])}")


def _is_share(cuts: Cuts, reading: Reading, side: str, place: Ranks, share: Made) -> None:
    """Hold a rank's share against the plain reading of the map."""
    held = cuts.held(reading, side, place)
    same_names(share, (name for one in held for name in one.part_names), f"rank {told(place)}")
    for one in held:
        codec = one.whole.codec
        if codec is None or codec.kind == "raw":
            (whole,) = one.whole.parts.values()
            compare(f"rank {told(place)}: {one.name}", share[one.name], one.of(whole), True)
        else:
            _is_stored_share(one, codec, share)


def _is_stored_share(held: Held, codec: Storage, share: Made) -> None:
    """A share of a tensor in a format decodes to the share of what the whole decodes to."""
    shapes = codec.part_shapes(held.shape)
    for role, name in codec.part_names(held.name).items():
        whole = held.whole.parts[held.part_names[name]]
        if share[name].dtype != whole.dtype:
            raise PropertyError(f"{name}: expected the dtype {whole.dtype}, found {share[name].dtype}")
        if tuple(share[name].shape) != shapes[role]:
            raise PropertyError(f"{name}: expected the shape {list(shapes[role])}, found {list(share[name].shape)}")
    whole = held.of(held.whole.value(torch.float32))
    parts = {name: share[name] for name in held.part_names}
    found = runtime_codec(codec).decode(held.name, parts, torch.float32)
    if not held.is_padded:  # zeros in a format may decode to something else
        compare(held.name, found.nan_to_num(nan=-1.0), whole.nan_to_num(nan=-1.0), True)


def _with_padding_filled(cuts: Cuts, reading: Reading, side: str, shares: Shares) -> Shares:
    """The same shares with ones where padding is: nobody looks at it."""
    filled = [dict(share) for share in shares]
    for place, share in zip(reading.places, filled, strict=True):
        for held in cuts.held(reading, side, place):
            if held.is_padded and (held.whole.codec is None or held.whole.codec.is_elementwise):
                name = next(iter(held.part_names))
                tensor = share[name].clone()
                for dim, positions in enumerate(held.positions or ()):
                    words = bits(tensor).narrow(dim, 0, len(positions))
                    words.index_fill_(dim, (positions == PADDING).nonzero().flatten(), 1)
                share[name] = tensor
    return filled


def _resharded(cuts: Cuts, one: Reading, other: Reading, side: str) -> None:
    with telling(one.ranks, side):
        shares, expected = cuts.shares(one, side), cuts.shares(other, side)
        for place, share in zip(other.places, expected, strict=True):
            found = cuts.adapter.reshard(shares, one.ranks, other.ranks, place, side=cuts.names[side])
            _same(found, share, f"to {told(other.ranks)}, rank {told(place)}")


def _commutes(cuts: Cuts, reading: Reading, side: str) -> None:
    """A rank's conversion of its share is the share of the whole's conversion, and the way back gives the share."""
    example, other = cuts.example, SIDES[side == "left"]
    state, made = cuts.state(side), example.read[1] if side == "left" else example.written[0]
    loose = _encoded_loosely(cuts, reading, side)
    for place, mine in zip(reading.places, cuts.shares(reading, side), strict=True):
        adapter = cuts.adapter.at(reading.ranks, place)
        theirs = cuts.adapter.shard(made, reading.ranks, place, side=cuts.names[other])
        if side == "left":
            found = adapter.read(mine, dtype=example.dtype)
            back = adapter.write(found, quantization=True)
        else:
            found = adapter.write(mine, quantization=False, dtype=example.dtype)
            back = cuts.adapter.at(reading.ranks, place).read(found, dtype=example.dtype)
        where = f"rank {told(place)}"
        same_names(found, theirs, f"{where}: converting")
        for name, tensor in theirs.items():
            compare(f"{where}: converting: {name}", found[name], tensor, name not in loose)
        free = (reading.name_on(group, named, side, place) for group, named in made_anyway(cuts.expansion, side))
        held = cuts.held(reading, side, place)
        _same_where_exact(f"{where}: converting back", held, state, back, mine, [*filter(None, free)])


def _same_where_exact(what: str, held: list[Held], state: State, back: Made, mine: Made, free: list[str]) -> None:
    """What comes back is what there was, wherever the laws promise that; `free` names may come besides."""
    kept = state.kept()
    exact = {name: kept[whole] for one in held for name, whole in one.part_names.items() if whole in kept}
    plain = {one.name for one in held if one.group.unpacked}
    same_names(back, exact, what, free)
    for name, is_exact in exact.items():
        if is_exact or name not in plain:
            compare(f"{what}: {name}", back[name], mine[name], is_exact)


def _encoded_loosely(cuts: Cuts, reading: Reading, side: str) -> set[str]:
    """Names on ranks of what is encoded anew with one scale for a whole dimension: a rank knows its own part of it."""
    other, loose = SIDES[side == "left"], set()
    for group in cuts.state(side).groups:
        codecs = [codec for tensor in group.rule.side(other) for codec in cuts.expansion.codecs(tensor)]
        if group.moved_as is None and any(_has_far_scales(codec) for codec in codecs):
            for place in reading.places:
                for named in cuts.expansion.names(group.match, other):
                    name = reading.name_on(group, named, other, place)
                    for codec in codecs if name is not None else ():
                        loose.update([name or "", *codec.names(name or "")])
    return loose


def _has_far_scales(codec: Storage) -> bool:
    return isinstance(codec, BlockStorage) and (None in codec.block or bool(codec.global_scale))


def _agree(cuts: Cuts, reading: Reading, side: str) -> None:
    shares = cuts.shares(reading, side)
    rng = Random(f"agree {cuts.example.seed} {told(reading.ranks)}")
    if not cuts.tells(reading, side):
        return
    stranger = {**shares[-1], "mapdsl_test.stranger": torch.zeros(2)}
    if not cuts.example.readers.of_name("mapdsl_test.stranger", side):
        _refuses_to_merge(cuts, reading, side, [*shares[:-1], stranger], ("R603",), ("mapdsl_test.stranger",))
    twice = _held_twice(cuts, reading, side)
    for (_, one), (rank, other) in rng.sample(twice, min(1, len(twice))):
        for name in other.part_names:
            lacking = [{n: t for n, t in share.items() if r != rank or n != name} for r, share in enumerate(shares)]
            names = (*other.part_names, *one.part_names, other.name)
            # Of a tensor without its payload there may be parts left that nobody can tell the use of.
            codes = ("R605",) if len(other.part_names) == 1 else ("R605", "R603")
            _refuses_to_merge(cuts, reading, side, lacking, codes, names)
        _differing(cuts, reading, side, shares, (rank, one, other))


def _differing(cuts: Cuts, reading: Reading, side: str, shares: Shares, twice: tuple[int, Held, Held]) -> None:
    """Change one element that two ranks hold in each part of the second rank's tensor."""
    rank, one, other = twice
    place = _common_place(one, other)
    for name in other.part_names:
        changed = shares[rank][name].clone()
        # Of a tensor in a format all positions are held twice, so all of its parts are.
        at = place if other.whole.codec is None or other.whole.codec.is_elementwise else None
        words = bits(changed)
        words[at if at is not None else (-1,) * words.dim()] ^= 1
        states = [{**share, name: changed} if r == rank else share for r, share in enumerate(shares)]
        _refuses_to_merge(cuts, reading, side, states, ("R602",), tuple(other.whole.parts))
        merged = cuts.adapter.merge(states, reading.ranks, side=cuts.names[side], compare=False)
        _same(merged, cuts.state(side).canonical, "merging without comparing")


def _held_twice(cuts: Cuts, reading: Reading, side: str) -> list[tuple[tuple[int, Held], tuple[int, Held]]]:
    """Tensors that two ranks hold: the first that does, and another that holds some of the same elements."""
    first: dict[str, list[tuple[int, Held]]] = {}
    for rank, place in enumerate(reading.places):
        for held in cuts.held(reading, side, place):
            if held.group.kept:
                first.setdefault(held.whole.named.name, []).append((rank, held))
    return [(all_[0], other) for all_ in first.values() for other in all_[1:] if _common_place(all_[0][1], other[1])]


def _common_place(one: Held, other: Held) -> tuple[int, ...] | None:
    """An element of the other rank's tensor that the first has too; of what is in a format, where both have all."""
    if other.positions is None or one.positions is None:
        return (0,) * len(other.whole.shape)
    codec = other.whole.codec
    if codec is not None and not codec.is_elementwise:
        alike = all(torch.equal(a, b) for a, b in zip(one.positions, other.positions, strict=True))
        return (0,) * len(other.shape) if alike and other.shape else None
    found = []
    for mine, theirs in zip(one.positions, other.positions, strict=True):
        common = [n for n, at in enumerate(theirs.tolist()) if at != PADDING and at in mine.tolist()]
        if not common:
            return None
        found.append(common[-1])
    return tuple(found)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuses_to_merge(
    cuts: Cuts, reading: Reading, side: str, states: Shares, codes: tuple[str, ...], names: tuple[str, ...]
) -> None:
    """Merging raises one of these codes and names one of the tensors, if any are given."""
    expected = codes[0] + f" naming {names[0]}" * bool(names)
    try:
        cuts.adapter.merge(states, reading.ranks, side=cuts.names[side])
    except ConversionError as err:
        if err.code in codes and (not names or any(name in str(err) for name in names)):
            return
        raise PropertyError(f"merging: expected {expected}, found {err}") from None
    raise PropertyError(f"merging: expected {expected}, found no error")


def _refused(cuts: Cuts, reading: Reading, side: str, code: str, words: list[list[str]]) -> None:
    """One of the ranks is refused its share; whatever is refused is so with this code, and with some of the words."""
    refused = 0
    for place in reading.places:
        try:
            cuts.adapter.shard(cuts.state(side).tensors(), reading.ranks, place, side=cuts.names[side])
        except ConversionError as err:
            refused += 1
            if err.code != code or not any(all(word in str(err) for word in listed) for listed in words):
                raise PropertyError(f"expected {code} naming {' '.join(words[0])}, found {err}") from None
    if not refused:
        raise PropertyError(f"expected {code} naming {' '.join(words[0])}, found no error")


def _same(found: Made, expected: Made, what: str) -> None:
    same_names(found, expected, what)
    for name, tensor in expected.items():
        compare(f"{what}: {name}", found[name], tensor, True)
