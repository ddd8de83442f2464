"""Lines and their indentation: the filter between lexer and parser, comments, and the lines of a broken file.

A statement ends with its line, except that a line ending in `+`, `,` or an arrow goes on in the next, and so does one
whose next line begins with an arrow. The filter sees this by tokens; `logical_lines` sees it by characters, so that it
works where no parser does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lark import Token
from lark.lark import PostLex

from mapdsl.language.source import Source
from mapdsl.language.tree import Comment

# Strings end with their line and hold no backslash, so whatever starts first, a string or a comment, hides the other.
STRING_OR_COMMENT = re.compile(r'"[^"\\\n]*"|#[^\n]*')
# Also arrows that are none: the line is one statement all the same, and the wrong arrow its error.
_ARROW_LIKE = r"(?:<[-=~]+>|[-=~]+>|<-+|[→←↔⇒⇐⇔])"
_ENDS_OPEN = re.compile(rf"(?:[+,]|{_ARROW_LIKE})$")
_STARTS_WITH_ARROW = re.compile(_ARROW_LIKE)


# Nobody nests so deep; a bound here keeps every later walk over a tree clear of Python's recursion limit.
MAX_DEPTH = 100


class LayoutError(Exception):
    """The indentation is wrong, or brackets are nested too deep; `recovery` says where."""


class Layout(PostLex):
    """Turns indentation into tokens and joins lines that go on. It keeps no state between parses or threads.

    (A line that *begins* with an arrow is joined in the grammar, where a lookahead sees the arrow.)
    """

    NEWLINE = "_NL"
    GOES_ON = frozenset({"PLUS", "COMMA", "BOTH", "TO", "FROM"})
    OPENS = frozenset({"LPAR", "LSQB"})
    CLOSES = frozenset({"RPAR", "RSQB"})
    always_accept = (NEWLINE,)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """Yield the tokens with `_INDENT` and `_DEDENT` in place."""
        open_indents = [0]
        before = None
        depth = 0
        for token in stream:
            depth += (token.type in self.OPENS) - (token.type in self.CLOSES)
            if depth > MAX_DEPTH or (before is None and token.type != self.NEWLINE and token.column != 1):
                raise LayoutError
            if token.type != self.NEWLINE:
                before = token.type
                yield token
            elif before not in self.GOES_ON:
                before = token.type
                yield token
                yield from self._indentation(token, open_indents)
        for _ in open_indents[1:]:
            yield Token("_DEDENT", "")

    def _indentation(self, newline: Token, open_indents: list[int]) -> Iterator[Token]:
        blank = newline.rsplit("\n", 1)[1]
        if "\t" in blank:
            raise LayoutError
        if len(blank) > open_indents[-1]:
            open_indents.append(len(blank))
            yield Token.new_borrow_pos("_INDENT", "", newline)
        while len(blank) < open_indents[-1]:
            open_indents.pop()
            yield Token.new_borrow_pos("_DEDENT", "", newline)
        if len(blank) != open_indents[-1]:
            raise LayoutError


@dataclass
class Line:
    """One statement or block head as it stands in the text, continued lines included, comments at its end not."""

    start: int
    end: int
    indent: str

    def text(self, source: Source) -> str:
        """The statement's own characters."""
        return source.text[self.start : self.end]


def comments(source: Source) -> tuple[Comment, ...]:
    """Every comment of a source, in order; a string may hold `#`."""
    found = []
    for match in STRING_OR_COMMENT.finditer(source.text):
        if match[0].startswith("#"):
            line, column = source.position(match.start())
            own_line = not source.line(line)[: column - 1].strip()
            found.append(Comment(match[0].rstrip(), match.start(), own_line))
    return tuple(found)


def without_comments(text: str) -> str:
    """The text with spaces for its comments: same length, same positions."""
    return STRING_OR_COMMENT.sub(lambda m: " " * len(m[0]) if m[0].startswith("#") else m[0], text)


def logical_lines(source: Source) -> list[Line]:
    """The statements and block heads of a text, found without parsing it."""
    lines: list[Line] = []
    start = 0
    goes_on = False
    for whole in without_comments(source.text).split("\n"):
        content = whole.strip(" \t\r")
        if content:
            first = start + whole.index(content)
            end = first + len(content)
            if lines and (goes_on or _STARTS_WITH_ARROW.match(content)):
                lines[-1].end = end
            else:
                lines.append(Line(first, end, whole[: first - start]))
            goes_on = bool(_ENDS_OPEN.search(content))
        start += len(whole) + 1
    return lines
