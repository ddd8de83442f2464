"""The formatter: the canonical layout of a `.map` file, its tree and its comments unchanged."""

from __future__ import annotations

from mapdsl.language import tree
from mapdsl.language.breaking import INDENT, MAX_WIDTH, Cut, cut_lines, cuts_at_comments, shortened
from mapdsl.language.columns import Row, align
from mapdsl.language.source import Source
from mapdsl.language.syntax import parse
from mapdsl.language.unparse import (
    unparse_header,
    unparse_modifiers,
    unparse_pair,
    unparse_side,
    unparse_statement,
    unparse_target,
)


def format_source(source: Source) -> str:
    """The text of a source in canonical layout; MapError where it has syntax errors."""
    return format_file(parse(source))


def format_file(file: tree.File) -> str:
    """The canonical text of a parsed file; comments and blank lines come from its source."""
    rows = _Rows(file).rows
    align(rows)
    lines: list[str] = []
    for row in rows:
        lines += [""] * row.blank_before + row.lines
    return "\n".join(lines) + "\n"


class _Rows:
    """The rows of a file in the order of its text, comments among them."""

    def __init__(self, file: tree.File) -> None:
        self.source = file.source
        self.comments = list(file.comments)
        self.rows: list[Row] = []
        self.end = 0  # where the last row ends in the source
        self.columns = [0]  # the source column of every depth up to the last statement's
        if file.header:
            self._add(file.header.span.start, file.header.span.end, Row("other", 0, [unparse_header(file.header)]))
        self._statements(file.statements, 0)
        self._own_comments(len(file.source.text), 0)

    def _statements(self, statements: tuple[tree.Statement, ...], depth: int) -> None:
        for statement in statements:
            if isinstance(statement, tree.Block):
                start, end = statement.pairs[0].span.start, statement.pairs[-1].span.end
                self._add(start, end, Row("head", depth, []), statement)
                self._statements(statement.body, depth + 1)
            else:
                self._add(statement.span.start, statement.span.end, _row(statement, depth))

    def _add(self, start: int, end: int, row: Row, block: tree.Block | None = None) -> None:
        """Append a row, and before it the comments that stand above it."""
        self._own_comments(start, row.depth)
        self.columns[row.depth :] = [self.source.position(start)[1] - 1]
        inner = self._take_comments(end)
        written = self.source.text[start:end]
        row.lines = _head_lines(block, row, written, start, inner) if block else _lines(row, written, start, inner)
        self._append(start, end, row)
        if self.comments and not self.comments[0].own_line and "\n" not in self._gap(self.comments[0].offset):
            row.comment = self.comments.pop(0).text

    def _own_comments(self, before: int, depth: int) -> None:
        """Comments above a statement go with it, unless their column says that they end the block before."""
        for comment in self._take_comments(before):
            at = depth
            column = self.source.position(comment.offset)[1] - 1
            deepest = self.rows[-1].depth if self.rows else 0
            while at < deepest and at + 1 < len(self.columns) and self.columns[at + 1] <= column:
                at += 1
            self._append(comment.offset, comment.offset + len(comment.text), Row("comment", at, [comment.text]))

    def _append(self, start: int, end: int, row: Row) -> None:
        opens_block = self.rows and self.rows[-1].kind == "head"
        row.blank_before = bool(self.rows) and not opens_block and self._gap(start).count("\n") > 1
        self.rows.append(row)
        self.end = end

    def _take_comments(self, before: int) -> list[tree.Comment]:
        taken = []
        while self.comments and self.comments[0].offset < before:
            taken.append(self.comments.pop(0))
        return taken

    def _gap(self, offset: int) -> str:
        return self.source.text[self.end : offset]


def _row(statement: tree.Statement, depth: int) -> Row:
    match statement:
        case tree.Rule():
            cells = [unparse_side(statement.left), statement.arrow, unparse_target(statement)]
            return Row("rule", depth, [*cells, unparse_modifiers(statement)])
        case tree.Param() | tree.Codec():
            name, equals, value = unparse_statement(statement).partition(" = ")
            return Row(type(statement).__name__.lower(), depth, [name, f"= {value}" if equals else ""])
    return Row("other", depth, [unparse_statement(statement)])


def _lines(row: Row, written: str, start: int, inner: list[tree.Comment]) -> list[str]:
    """The lines of a statement that has to be cut, or none."""
    text = " ".join(cell for cell in row.cells if cell)
    if inner:
        cuts = cuts_at_comments(written, start, inner, text)
        return _as_written(row, written) if cuts is None else cut_lines(text, row.indent, cuts)
    if len(row.indent) + len(text) > MAX_WIDTH:
        return shortened(text, row.indent)
    return []


def _head_lines(block: tree.Block, row: Row, written: str, start: int, inner: list[tree.Comment]) -> list[str]:
    """The lines of a block head: one a pair; where comments stand inside it, cut there too."""
    for short in (True, False):
        pairs = [unparse_pair(pair, short=short) for pair in block.pairs]
        text = ", ".join(pairs)
        cuts = cuts_at_comments(written, start, inner, text + ":") if inner else []
        if cuts is not None:
            at = {cut.place: cut for cut in cuts}
            for n in range(1, len(pairs)):
                comma = sum(map(len, pairs[:n])) + len(", ") * n - 1
                at.setdefault(comma, Cut(comma)).deeper = ""
            return cut_lines(text + ":", row.indent, [at[place] for place in sorted(at)])
    return _as_written(row, written + ":")


def _as_written(row: Row, written: str) -> list[str]:
    first, *rest = [line.strip() for line in written.splitlines()]
    return [row.indent + first, *(row.indent + INDENT + line for line in rest if line)]
