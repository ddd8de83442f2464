"""`python -m tests.mutation.run`: plant every fault in the shipped map, count those that are noticed.

Writes `docs/mutation.md`. Exit status 1 where fewer than 95 in 100 are noticed, or a survivor has no explanation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
from collections import Counter
from pathlib import Path

import torch

from tests.mutation.judge import STAGES, noticed, prepare
from tests.mutation.operators import Mutant, mutants
from tests.mutation.survivors import why_it_survives

ROOT = Path(__file__).parents[2]
MAP = ROOT / "rules" / "deepseek_v4.map"
PAGE = ROOT / "docs" / "mutation.md"
LEAST = 0.95


def main() -> int:
    """Judge all mutants, or a sample of them, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__)
    parser.add_argument("--sample", type=int, help="judge this many, drawn at random, and write no page")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    options = parser.parse_args()
    planted = list(mutants(MAP.read_text(encoding="utf-8")))
    if options.sample is not None:
        planted = random.Random(options.seed).sample(planted, min(options.sample, len(planted)))
    verdicts = judge(planted, options.jobs)
    survivors = [mutant for mutant, verdict in zip(planted, verdicts, strict=True) if not verdict]
    score = 1 - len(survivors) / len(planted)
    print(f"{len(planted)} mutants, {len(survivors)} survive, score {score:.1%}")
    if options.sample is None:
        PAGE.write_text(page(planted, verdicts), encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}")
    unexplained = [mutant for mutant in survivors if why_it_survives(mutant) is None]
    for mutant in unexplained:
        print(f"survives without an explanation: line {mutant.line}, {mutant.name}")
    return 0 if score >= LEAST and not unexplained else 1


def judge(planted: list[Mutant], jobs: int) -> list[str]:
    """The stage that notices each mutant, or nothing."""
    prepare()
    with multiprocessing.Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        verdicts = []
        for count, verdict in enumerate(pool.imap(noticed, [mutant.text for mutant in planted], chunksize=4), 1):
            verdicts.append(verdict)
            if sys.stderr.isatty():
                print(f"\r{count} of {len(planted)}", end="", file=sys.stderr)
        return verdicts


def page(planted: list[Mutant], verdicts: list[str]) -> str:
    """`docs/mutation.md`."""
    counts = Counter((mutant.operator, verdict) for mutant, verdict in zip(planted, verdicts, strict=True))
    survivors = [mutant for mutant, verdict in zip(planted, verdicts, strict=True) if not verdict]
    score = 1 - len(survivors) / len(planted)
    out = [
        "# Mutation: is a wrong map noticed?",
        "",
        "`make mutation` plants one small fault at a time in `rules/deepseek_v4.map` (two names swapped, a guard off",
        "by one, two axes swapped, a rule left out, another block size, ...) and asks whether anything notices: first",
        "`check`, then tensors (tiny checkpoints, converted both ways by the mutant and by the adapter that",
        "`tests/golden` keeps and the differential tests hold against NeMo Automodel's), then `check --against` the",
        "released listing. This page is written by the run.",
        "",
        f"**{len(planted)} mutants, {len(planted) - len(survivors)} noticed: {score:.1%}.**",
        "",
        "| fault | mutants | " + " | ".join(STAGES) + " | survive |",
        "|---|---|" + "---|" * len(STAGES) + "---|",
    ]
    for operator in sorted({mutant.operator for mutant in planted}):
        row = [counts[operator, stage] for stage in (*STAGES, "")]
        out.append(f"| {operator} | {sum(row)} | " + " | ".join(map(str, row)) + " |")
    row = [sum(count for (_, stage), count in counts.items() if stage == wanted) for wanted in (*STAGES, "")]
    out += [f"| **all** | {sum(row)} | " + " | ".join(map(str, row)) + " |", "", "## Survivors", ""]
    groups: dict[str, list[Mutant]] = {}
    for mutant in survivors:
        groups.setdefault(why_it_survives(mutant) or "Not explained.", []).append(mutant)
    for reason, members in groups.items():
        out += [f"{reason}", ""]
        for mutant in members:
            operator, _, change = mutant.name.partition(": ")
            before, _, after = change.partition(" => ")
            out += [f"- line {mutant.line}, {operator}", "", "  ```", f"  - {before}", f"  + {after}", "  ```", ""]
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
