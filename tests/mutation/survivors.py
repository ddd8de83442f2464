"""Why a mutant may survive: because it means the same. Any other survivor is a gap in what is tried."""

from __future__ import annotations

from tests.mutation.operators import Mutant

# The operator, what the mutant's name says, and why nothing can notice it.
REASONS = [
    (
        "scale dtypes changed",
        "codec fp8v3 = ",
        "The first dtype is that of scales written anew. V3's spelling is the first format of no tensor, so its scales "
        "are written anew only in the dtype that was read: the order of its dtypes means nothing.",
    ),
    (
        "axes swapped",
        "[D Din] => ",
        "Both axes have the hidden size, and the rule moves neither: the two shapes are the same.",
    ),
]


def why_it_survives(mutant: Mutant) -> str | None:
    """The explanation of a survivor, None where there is none."""
    for operator, part, reason in REASONS:
        if mutant.operator == operator and part in mutant.name:
            return reason
    return None
