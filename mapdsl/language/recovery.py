"""Every syntax error of a broken file, in one pass: each statement is parsed by itself, the indentation is read apart.

A statement ends with its line, so an error in one says nothing about the next: no guessing where to go on, and the time
stays linear in the size of the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lark import Token, Tree
from lark.exceptions import UnexpectedInput

from mapdsl.language.build import Builder
from mapdsl.language.diagnostics import Diagnostic, MapError
from mapdsl.language.layout import MAX_DEPTH, Line, logical_lines, without_comments
from mapdsl.language.parser import parser
from mapdsl.language.source import Source, Span
from mapdsl.language.wording import STATEMENT_WORDS, describe

# More errors than anybody reads: a file of another kind was opened.
MAX_ERRORS = 50
# Far beyond any rule; a bound here bounds the time of every pattern that is tried on a line.
MAX_LINE = 20_000

# Characters that are nowhere allowed: control characters, and those that make a text look other than it reads.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x85\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]|\r(?!\n)")
_STRING_OR_BRACKET = re.compile(r'"[^"\\\n]*"|[\[\](){}]')
_CLOSES = {"]": "[", ")": "(", "}": "{"}
_HEADER = "`map NAME: LEFT <-> RIGHT`"
# What never stands inside brackets: a line that begins so, or has an arrow, is a statement of its own.
_NEW_STATEMENT = re.compile(rf"\s*(?:$|(?:{'|'.join(STATEMENT_WORDS)})\s)")
_BEFORE_ARROW = re.compile(r"(?:(?!->|<-).)*")
_REACH = 30


def find_errors(source: Source) -> list[Diagnostic]:
    """The syntax errors of a source, sorted; MAX_ERRORS at most."""
    return _Recovery(source).run()


def is_odd(text: str) -> bool:
    """Whether a text holds characters or lines that are refused before anything is parsed."""
    return bool(_CONTROL.search(text)) or len(max(text.split("\n"), key=len)) > MAX_LINE


@dataclass
class _Statement:
    """A line with what could be read of it: `parsed` is None where it holds an error."""

    line: Line
    parsed: Tree[Token] | None
    is_header: bool

    @property
    def is_head(self) -> bool:
        return self.parsed is not None and self.parsed.data == "head"


class _Recovery:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: list[Diagnostic] = []

    def report(self, code: str, message: str, start: int, end: int, hint: str = "") -> None:
        self.found.append(Diagnostic(code, message, (Span(self.source, start, end),), help=hint))

    def run(self) -> list[Diagnostic]:
        self._check_characters()
        statements = self._statements()
        self._check_header(statements)
        self._check_indentation(statements)
        found = sorted(self.found, key=Diagnostic.sort_key)
        return found[:MAX_ERRORS]

    def _check_characters(self) -> None:
        for match in _CONTROL.finditer(self.source.text):
            if len(self.found) < MAX_ERRORS:
                hint = "save the file without a byte order mark" if match[0] == "\ufeff" else ""
                message = f"a map holds no character U+{ord(match[0]):04X}"
                self.report("S101", message, match.start(), match.end(), hint)

    # --- statements ---

    def _statements(self) -> list[_Statement]:
        statements = []
        resume = 0
        for line in logical_lines(self.source):
            if line.start >= resume:
                resume = self._end_of_brackets(line)
                statements.append(self._statement(line, closed_below=resume > 0))
            if len(self.found) > MAX_ERRORS:
                break
        return statements

    def _statement(self, line: Line, closed_below: bool) -> _Statement:
        text = line.text(self.source)
        statement = _Statement(line, None, bool(re.match(r"map(?![\w./@${]|-(?!-*>))", text)))
        length = max(map(len, text.split("\n")))
        if length > MAX_LINE:
            message = f"a line of {length:,} characters; no statement is longer than {MAX_LINE:,}"
            self.report("S101", message, line.start, line.start + 1)
        elif (deep := _too_deep(without_comments(text))) is not None:
            place = line.start + deep
            self.report("S101", f"this is nested more than {MAX_DEPTH} deep", place, place + 1)
        elif not _CONTROL.search(text):
            statement.parsed = self._parse(line, text, closed_below)
        return statement

    def _parse(self, line: Line, text: str, closed_below: bool) -> Tree[Token] | None:
        """The parsed line, its errors reported also where it parses."""
        unclosed = _open_brackets(without_comments(text))
        for offset in unclosed if len(unclosed) < 4 else unclosed[:1]:
            start = line.start + offset
            hint = "a statement ends with its line, except behind `+`, `,` or an arrow" if closed_below else ""
            self.report("S102", f"this `{text[offset]}` is never closed", start, start + 1, hint)
        try:
            parsed = parser().parse(text, start="line")
        except UnexpectedInput as problem:
            found = describe(problem, self.source, line.start, line.end)
            # What the parser meets behind an open bracket is only its consequence.
            if not unclosed or found.spans[0].start < line.start + unclosed[0]:
                self.found.append(found)
            return None
        builder = Builder(self.source, line.start, self.found)
        try:
            builder.build(parsed)
        except MapError as problem:
            self.found += problem.diagnostics
        return parsed

    def _end_of_brackets(self, line: Line) -> int:
        """Where the brackets that a line leaves open are closed, a few lines below, so that it is one error; or 0."""
        text = self.source.text
        if not _open_brackets(without_comments(line.text(self.source))):
            return 0
        end = line.end
        for _ in range(_REACH):
            start = text.find("\n", end) + 1
            end = text.find("\n", start)
            end = len(text) if end < 0 else end
            if not start or _NEW_STATEMENT.match(text, start, end):
                return 0
            arrow = start + len(_BEFORE_ARROW.match(text, start, end)[0])  # type: ignore[index]
            if not _open_brackets(without_comments(text[line.start : arrow])):
                return end
            if arrow < end:
                return 0
        return 0

    # --- header and indentation ---

    def _check_header(self, statements: list[_Statement]) -> None:
        """One header, first."""
        headers = [statement for statement in statements if statement.is_header]
        if not statements:
            end = len(self.source.text.rstrip("\n"))
            self.report("S101", f"expected {_HEADER}, found the end of the file", end, end)
        elif not headers and statements[0].parsed is not None:
            line = statements[0].line
            word = line.text(self.source).split()[0]
            self.report("S101", f"expected {_HEADER}, found `{word}`", line.start, line.start + len(word))
        for number, header in enumerate(headers):
            if header is not statements[0]:
                message = "a map has one header" if number else "the header stands first"
                self.report("S101", message, header.line.start, header.line.start + len("map"))

    def _check_indentation(self, statements: list[_Statement]) -> None:
        open_indents = [0]
        before: _Statement | None = None
        builder = Builder(self.source, found=self.found)
        for statement in statements:
            width = len(statement.line.indent.expandtabs(4))
            self._check_tabs(statement, before)
            if width > open_indents[-1]:
                self._check_opening(statement, before)
                open_indents.append(width)
            else:
                self._check_body(before)
                while width < open_indents[-1]:
                    open_indents.pop()
                if width != open_indents[-1]:
                    self._report_uneven(statement, width, open_indents[-1])
                    open_indents.append(width)
            if len(open_indents) > 1 and statement.parsed is not None:
                builder.offset = statement.line.start
                builder.check_inside_block(statement.parsed)
            before = statement
        if len(self.found) <= MAX_ERRORS:
            self._check_body(before)

    def _check_tabs(self, statement: _Statement, before: _Statement | None) -> None:
        """A tab in the indentation; of lines in a row, the first."""
        indent = statement.line.indent
        if "\t" in indent and not (before and "\t" in before.line.indent):
            start = statement.line.start - len(indent) + indent.index("\t")
            self.report("S103", "indented by a tab", start, start + 1, "blocks are indented by spaces, four a level")

    def _check_opening(self, statement: _Statement, before: _Statement | None) -> None:
        """An indented line needs a head above; a line above that holds an error might have been one."""
        if "\t" in statement.line.indent:
            return
        start = statement.line.start
        place = start - len(statement.line.indent), start
        if before is None:
            self.report("S103", "indented, but no block is open", *place, "begin the line in the first column")
        elif before.parsed is not None and not before.is_head:
            hint = "end the head with `:`, or indent this line like the one above"
            self.report("S103", "indented, but the line above is no block head", *place, hint)

    def _check_body(self, before: _Statement | None) -> None:
        """A head needs an indented line below."""
        if before is not None and before.is_head:
            hint = "indent its statements by four spaces, or take the `:` away if it is a rule"
            self.report("S103", "this block head has no body", before.line.start, before.line.end, hint)

    def _report_uneven(self, statement: _Statement, width: int, outer: int) -> None:
        start = statement.line.start
        message = f"indented by {width}, which no open block is; the next one outwards is indented by {outer}"
        self.report("S103", message, start - len(statement.line.indent), start)


def _too_deep(text: str) -> int | None:
    """Offset of the first bracket that lies deeper than anybody nests."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += (match[0] in "([{") - (match[0] in _CLOSES)
        if depth > MAX_DEPTH:
            return match.start()
    return None


def _open_brackets(text: str) -> list[int]:
    """Offsets of the brackets that are not closed before their surroundings end."""
    unclosed = []
    stack: list[int] = []
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "([{":
            stack.append(match.start())
        elif match[0] in _CLOSES and any(text[i] == _CLOSES[match[0]] for i in stack):
            while text[stack[-1]] != _CLOSES[match[0]]:
                unclosed.append(stack.pop())
            stack.pop()
    return sorted(unclosed + stack)
