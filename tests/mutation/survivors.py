"""Why a mutant may survive: it means the same map, or what it changes is beyond what is tried."""

from __future__ import annotations

from tests.mutation.operators import Mutant

REASONS: list[tuple[str, str, str]] = []


def why_it_survives(mutant: Mutant) -> str | None:
    """The explanation of a survivor, None where there is none."""
    for operator, part, reason in REASONS:
        if mutant.operator == operator and part in mutant.name:
            return reason
    return None
