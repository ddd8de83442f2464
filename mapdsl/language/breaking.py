"""Where a statement may go on in the next line: cut at the comments inside it, or because it is too long.

A line goes on behind `+`, `,` and an arrow, and before an arrow; the parser's own tokens say which those are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mapdsl.language.layout import Layout
from mapdsl.language.parser import parser
from mapdsl.language.tree import Comment

MAX_WIDTH = 120
INDENT = "    "
# A left side so short would look lost on a line of its own.
SHORT = 30

_ARROWS = frozenset({"BOTH", "TO", "FROM"})


@dataclass(frozen=True)
class Joint:
    """A token at which a line may be cut: where it stands, how many brackets are open around it."""

    kind: str
    start: int
    end: int
    depth: int

    @property
    def is_arrow(self) -> bool:
        """Whether the line may be cut before it, too."""
        return self.kind in _ARROWS


@dataclass
class Cut:
    """A place where a statement's text is cut, the comments that stand there, and what indents the next line."""

    place: int
    comments: list[Comment] = field(default_factory=list)
    deeper: str = INDENT


def joints(text: str) -> list[Joint]:
    """The joints of one statement or block head, in order."""
    found = []
    depth = 0
    for token in parser().parse_interactive(text, start="line").iter_parse():
        depth += (token.type in Layout.OPENS) - (token.type in Layout.CLOSES)
        if token.type in Layout.GOES_ON:
            found.append(Joint(token.type, token.start_pos or 0, token.end_pos or 0, depth))
    return found


def cuts_at_comments(written: str, start: int, comments: list[Comment], text: str) -> list[Cut] | None:
    """The cuts that keep a statement's inner comments where they are, in its canonical text.

    `written` is the statement as it stands in the source, at offset `start`. None if the two do not have the same
    joints, so that nobody can say where a comment belongs.
    """
    old, new = joints(written), joints(text)
    if [joint.kind for joint in old] != [joint.kind for joint in new]:
        return None
    cuts: dict[int, Cut] = {}
    for comment in comments:
        passed = sum(joint.end <= comment.offset - start for joint in old)
        if passed and _nothing_between(written[old[passed - 1].end : comment.offset - start]):
            place = new[passed - 1].end
        else:
            # Nothing but an arrow at the start of the next line lets a line end here.
            place = new[passed].start
        cuts.setdefault(place, Cut(place)).comments.append(comment)
    return [cuts[place] for place in sorted(cuts)]


def _nothing_between(text: str) -> bool:
    return all(not line.split("#")[0].strip() for line in text.split("\n"))


def cut_lines(text: str, indent: str, cuts: list[Cut]) -> list[str]:
    """The lines of a statement cut at the given places, comments included."""
    lines: list[str] = []
    before = 0
    deeper = ""
    for cut in [*cuts, Cut(len(text))]:
        line = indent + deeper + text[before : cut.place].strip()
        comments = list(cut.comments)
        if comments and not comments[0].own_line:
            line += f"  {comments.pop(0).text}"
        lines.append(line)
        deeper = cut.deeper
        lines += [indent + deeper + comment.text for comment in comments]
        before = cut.place
    return lines


def shortened(text: str, indent: str) -> list[str]:
    """The lines of a statement that is too long for one; one line if cutting it does not help.

    First it is cut before its arrow, then also behind the `+` between tensors, then also within brackets. A short left
    side keeps its arrow where cutting the right one is enough.
    """
    found = joints(text)
    at_arrows = [Cut(joint.start) for joint in found if joint.is_arrow and joint.depth == 0]
    short_left = bool(at_arrows) and at_arrows[0].place <= SHORT
    best = [indent + text]
    for depth, arrows in [(-1, at_arrows), *[(0, [])] * short_left, (0, at_arrows), (1, at_arrows), (2, at_arrows)]:
        places = [joint.end for joint in found if not joint.is_arrow and joint.depth <= depth]
        lines = cut_lines(text, indent, _filled(text, indent, arrows, places))
        if max(map(len, lines)) < max(map(len, best)):
            best = lines
        if max(map(len, best)) <= MAX_WIDTH:
            break
    return best


def _filled(text: str, indent: str, forced: list[Cut], places: list[int]) -> list[Cut]:
    """Cuts that fill every line as far as the places allow."""
    cuts = []
    start = 0
    for end in [*(cut.place for cut in forced), len(text)]:
        while True:
            room = MAX_WIDTH - len(indent) - (len(INDENT) if start else 0)
            inside = [place for place in places if start < place < end]
            if len(text[start:end].strip()) <= room or not inside:
                break
            fitting = [place for place in inside if len(text[start:place].strip()) <= room]
            start = fitting[-1] if fitting else inside[0]
            cuts.append(Cut(start))
        if end < len(text):
            cuts.append(Cut(end))
            start = end
    return cuts
