"""The pages behind `mapdsl explain K202`: what a code means, an example that has it, and the example mended.

A page is a markdown file, `mapdsl/explanations/K202.md`: a heading `# K202 written-twice`, a paragraph, and three
sections `## Fails`, `## Why`, `## Mended`. Fails and Mended hold fenced blocks, from which tests build the case:

- ```` ```map ```` the map; ```` ```map base.map ```` a file beside it, for `include`;
- ```` ```config ```` the config.json; alone, the map is expanded under it;
- ```` ```listing ```` headers of a checkpoint, as `mapdsl snapshot` writes them: the map is held against it;
- ```` ```read ```` tensors that an adapter reads, in the same notation with ` = VALUE` for what all elements are;
  ```` ```write ```` those that it writes back, ```` ```write quantized ```` in their stored formats. Several of these
  go through one adapter, in order;
- ```` ```ranks ```` the number of ranks along each dimension of the mesh, `tp = 4`;
- ```` ```python ```` code, for what only a program can do wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "explanations"
KINDS = ("map", "config", "listing", "read", "write", "ranks", "python")
_FENCE = re.compile(r"^```(\w+) *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^## (\w+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its kind, what stands behind that, and the text."""

    kind: str
    argument: str
    text: str


@dataclass(frozen=True)
class Page:
    """A page with its two examples."""

    code: str
    name: str
    text: str
    fails: tuple[Block, ...]
    why: str
    mended: tuple[Block, ...]


def read_page(code: str) -> Page:
    """The page of a code of the catalogue; ValueError where the page is not laid out as this module says."""
    return parse_page((FOLDER / f"{code}.md").read_text(encoding="utf-8"))


def parse_page(text: str) -> Page:
    """A page from its text; ValueError where a section is missing or a block is of no known kind."""
    heading = re.match(r"# ([A-Z]\d{3}) ([\w-]+)\n", text)
    pieces = _SECTION.split(text)
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    if heading is None or list(sections) != ["Fails", "Why", "Mended"]:
        raise ValueError("a page has a heading `# CODE name` and the sections Fails, Why, Mended")
    fails, mended = (_blocks(sections[name]) for name in ("Fails", "Mended"))
    return Page(heading[1], heading[2], text, fails, sections["Why"].strip(), mended)


def _blocks(text: str) -> tuple[Block, ...]:
    blocks = tuple(Block(kind, argument.strip(), body) for kind, argument, body in _FENCE.findall(text))
    unknown = [block.kind for block in blocks if block.kind not in KINDS]
    if unknown or not blocks:
        raise ValueError(f"expected blocks of {', '.join(KINDS)}, found {', '.join(unknown) or 'none'}")
    return blocks
