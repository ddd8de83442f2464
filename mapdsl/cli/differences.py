"""What `mapdsl diff` and `mapdsl verify` print of tensors that differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mapdsl.cli.output import escaped

if TYPE_CHECKING:
    from mapdsl.checkpoint.elements import Difference
    from mapdsl.checkpoint.headers import StoredTensor

SHOWN = 20


def listing_lines(tensors: Iterable[StoredTensor]) -> list[str]:
    """Names, dtypes and shapes as in a listing, ranges folded."""
    from mapdsl.checkpoint.elements import form
    from mapdsl.checkpoint.listing import write_listing

    tensors = list(tensors)
    try:
        lines = write_listing(tensors).splitlines()
    except ValueError:  # a torch file may have names that are no Unicode text
        return [f"{escaped(tensor.name)} {form(tensor)}" for tensor in tensors]
    return [escaped(line) for line in lines if not line.startswith("#")]


def difference_lines(differences: Sequence[Difference], first: str, second: str) -> list[str]:
    """Dtypes and shapes that differ, folded, then elements; `first` and `second` say whose they are."""
    from mapdsl.checkpoint.folding import fold_names

    groups: dict[tuple[str, str, str], list[str]] = {}
    for difference in differences:
        if difference.kind != "bytes":
            groups.setdefault((difference.kind, difference.expected, difference.found), []).append(difference.name)
    lines = []
    for (kind, expected, found), names in groups.items():
        plain = [name for name in names if not set(name) & set("{}")]
        texts = [fold.text() for fold in fold_names(plain)] + [name for name in names if name not in plain]
        lines += [f"{escaped(text)}: another {kind}: {first} {expected}, {second} {found}" for text in texts]
    in_bytes = [difference for difference in differences if difference.kind == "bytes"]
    for difference in in_bytes[:SHOWN]:
        lines += _element(difference, first, second)
    if len(in_bytes) > SHOWN:
        lines.append(f"... and {len(in_bytes) - SHOWN:,} more tensors with other bytes (--json lists all)")
    return lines


def _element(difference: Difference, first: str, second: str) -> list[str]:
    count = f"{difference.differing:,} of {difference.nbytes:,} bytes differ"
    values = f"{first} {difference.expected}, {second} {difference.found}"
    lines = [f"{escaped(difference.place)}: {values}; {count}"]
    if difference.origin:
        beside = [name for name in difference.sources if not difference.origin.startswith(name)]
        also = f", with {escaped(', '.join(beside))}" if beside else ""
        lines.append(f"  from {escaped(difference.origin)}{also}")
    elif difference.sources:
        shown = ", ".join(difference.sources[:4])
        more = f" and {len(difference.sources) - 4:,} more" if len(difference.sources) > 4 else ""
        lines.append(f"  from {escaped(shown)}{more}")
    return lines
