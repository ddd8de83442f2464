"""From the parser's exception to a sentence: what was expected, what was found, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lark.exceptions import UnexpectedCharacters, UnexpectedInput

from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.source import Source, Span

STATEMENT_WORDS = [
    "map", "param", "index", "codec", "mesh", "example", "law", "accept", "include", "override", "remove",
]  # fmt: skip

_EXPRESSION = {"PATH", "INT", "STRING", "CALLED", "TRUE", "FALSE", "MINUS", "NOT", "LPAR", "LSQB", "_HAS"}
_OPERATOR = {"PLUS", "MINUS", "TIMES", "COMPARE", "IN", "NOT", "AND", "OR", "LSQB"}
# Sets of terminals that are one thing to a reader: where the first set is expected, the second is called so.
_GROUPS: list[tuple[set[str], set[str], str]] = [
    ({"_PARAM", "KEY"}, {f"_{word.upper()}" for word in STATEMENT_WORDS} | {"KEY", "NOTHING"}, "a statement"),
    ({"BOTH", "TO", "FROM"}, {"BOTH", "TO", "FROM"}, "an arrow"),
    (
        {"STAR", "DOTS", "PATH"},
        _EXPRESSION | {"STAR", "DOTS", "LOCAL", "REPEAT"},
        "an index, an enumeration or a wildcard",
    ),
    ({"STAR", "DOTS", "SPELLING"}, {"STAR", "DOTS", "SPELLING"}, "spellings or a wildcard"),
    ({"KEY", "NUMBER"}, {"KEY", "NUMBER", "CALLED"}, "a number, a name or a generator"),
    ({"KEY", "NOTHING"}, {"KEY", "NOTHING"}, "a tensor or `_`"),
    ({"AXIS"}, {"AXIS", "INT", "LPAR", "REPEAT", "_PAD", "_ZEROS"}, "an axis"),
    ({"PATH", "INT"}, _EXPRESSION, "an expression"),
    ({"BLOCKSIZE", "NAME"}, {"BLOCKSIZE", "NAME", "NUMBER", "STRING"}, "an argument"),
    ({"PLUS", "MINUS"}, _OPERATOR, "an operator"),
]
_WORDS = {
    "NAME": "a name", "KEY": "the name of a tensor", "STRING": "a string in double quotes", "SPELLING": "a spelling",
    "BOTH": "`<->`", "TO": "`->`", "FROM": "`<-`", "COLON": "`:`", "EQUALS": "`=`", "TILDE": "`~`", "LPAR": "`(`",
    "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "RBRACE": "`}`", "VBAR": "`|`", "COMMA": "`,`", "PLUS": "`+`",
    "COMPARE": "a comparison", "__ANON_0": "`??`", "TEXT": "text", "LBRACE": "`{`", "$END": "the end of the line",
}  # fmt: skip

ARROWS = {"<->", "->", "<-"}
_RUN = re.compile(r"[-=<>~:!→←↔⇒⇐⇔]+")
_RESERVED_ALONE = re.compile(rf"({'|'.join(STATEMENT_WORDS)})\s*(?:<->|->|<-|\[|\+|:|as\s)")
_OPENED_BY = {"]": "[", ")": "(", "}": "{"}
_UNKNOWN = re.compile(r'"[^"\\]*"|[\w.]+|(.)\1*', re.DOTALL)
_BLANK = re.compile(r"(?:\s|#[^\n]*\n)+")
_COMPARISONS = {"=": "==", "=>": ">=", "=<": "<=", "<>": "!=", "===": "==", "~=": "!="}
_CHAIN = re.compile(
    r"(?:^|\b(?:where|and|or|not)\b|[(,])\s*([^<>=!(),]+?)\s*(==|!=|<=|>=|<|>)\s*([^<>=!]+?)\s*"
    r"(==|!=|<=|>=|<|>)\s*([^<>=!:,]+?)\s*(?:$|[:,#]|\b(?:and|or)\b)"
)
_INSTEAD = {
    "&": "write `and`", "|": "write `or`", "!": "write `not`, or `!=`", "/": "write `//`", "^": "there is no `^`",
    "'": "strings stand in double quotes", ";": "a statement ends with its line",
    "\\": "no backslash is needed: a line that ends in `+`, `,` or an arrow goes on in the next",
    "“": "strings stand in plain double quotes", "”": "strings stand in plain double quotes",
    "≥": "write `>=`", "≤": "write `<=`", "≠": "write `!=`",
}  # fmt: skip
# A tensor with its formats, and the shape that stands behind them.
_SHAPE_BEHIND_FORMATS = re.compile(r"(\S+)\s+as\s+([^\s\[\]+<>]+)\s*$")
_INSTEAD_IN_SHAPES = {
    ",": "spaces part the dimensions: `[f d]`",
    "+": "a sum stands in parentheses: `[(f + d)]`",
    "*": "the axes of one dimension stand in parentheses: `[(f d)]`",
}


@dataclass(frozen=True)
class Problem:
    """Where the parser stopped in the text from `start` to `end`, what stands there, what could stand there."""

    source: Source
    start: int
    end: int
    offset: int
    found: str
    expected: set[str]

    @property
    def before(self) -> str:
        """What stands before the place."""
        return self.source.text[self.start : self.offset]

    @property
    def text(self) -> str:
        """The whole statement."""
        return self.source.text[self.start : self.end]

    def diagnostic(self, code: str, message: str, start: int, end: int, hint: str = "") -> Diagnostic:
        """A finding in the same source."""
        return Diagnostic(code, message, (Span(self.source, start, end),), help=hint)


def describe(error: UnexpectedInput, source: Source, start: int, end: int) -> Diagnostic:
    """The diagnostic for what the parser says about the text of a source from `start` to `end`."""
    problem = _problem(error, source, start, end)
    for special in _SPECIAL:
        diagnostic = special(problem)
        if diagnostic:
            return diagnostic
    message = f"expected {expectation(problem.expected)}, found {_shown(problem.found)}"
    return problem.diagnostic("S101", message, problem.offset, problem.offset + len(problem.found), _hint(problem))


def expectation(expected: set[str]) -> str:
    """A set of terminals in words: `a name`, "`=` or the end of the line"."""
    if {"BOTH", "TO", "FROM"} <= expected:
        return "an arrow"
    rest = set(expected)
    phrases = []
    if "COMPARE" in rest and "AND" not in rest:
        phrases.append("a comparison")
        rest -= _OPERATOR
    for needed, covered, phrase in _GROUPS:
        if needed <= rest:
            phrases.append(phrase)
            rest -= covered
    phrases += [word for name, word in _WORDS.items() if name in rest]
    phrases += [f"`{name.strip('_').lower()}`" for name in sorted(rest - set(_WORDS))]
    if len(phrases) > 4 and "$END" in expected:
        return "the end of the line"
    phrases.sort(key=lambda phrase: phrase == _WORDS["$END"])
    return " or ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _problem(error: UnexpectedInput, source: Source, start: int, end: int) -> Problem:
    stopped: Any = error
    expected = set(stopped.interactive_parser.accepts()) - {"_NL", "_INDENT", "_DEDENT"}
    if isinstance(error, UnexpectedCharacters):
        offset = start + (error.pos_in_stream or 0)
        return Problem(source, start, end, offset, source.text[offset], expected)
    token = stopped.token
    if token.type in ("$END", "_NL"):
        offset = end if token.type == "$END" else start + token.start_pos
        return Problem(source, start, end, offset, "", expected)
    offset, found = start + (token.start_pos or 0), str(token)
    if token.type == "TEXT":
        # Inside a name nearly anything is text, so this is what the lexer calls a character that it does not know.
        found = _UNKNOWN.match(found)[0]  # type: ignore[index]
    return Problem(source, start, end, offset, found, expected)


def _shown(found: str) -> str:
    if not found:
        return "the end of the line"
    return f"`{found}`" if found.isprintable() else f"the character U+{ord(found[0]):04X}"


# --- the mistakes that have an answer ---


def _unknown_arrow(problem: Problem) -> Diagnostic | None:
    """A run of `-=<>~` where an arrow is expected, or that could only be meant as one."""
    run = _run_at(problem)
    if not run or run[0] in ARROWS:
        return None
    text, start = run
    arrow_expected = "BOTH" in problem.expected
    if problem.expected & {"COMPARE", "PATH"} and not arrow_expected:
        if text not in _COMPARISONS:
            return None
        message = f"expected a comparison, found `{text}`"
        return problem.diagnostic("S101", message, start, start + len(text), f"write `{_COMPARISONS[text]}`")
    like_an_arrow = len(text) > 1 and text not in {"==", "!=", "<=", ">="} and set(text) & set("<>→←↔⇒⇐⇔")
    if text == ":" or not (arrow_expected or like_an_arrow or set(text) & set("→←↔⇒⇐⇔")):
        return None
    # What is dropped or never made stands beside `_` and has an arrow of one direction.
    sides = problem.source.text[problem.start : start].rstrip(), problem.source.text[start + len(text) : problem.end]
    arrow = "<-" if sides[0] == "_" else "->" if re.match(r"\s*_(?![\w.{])", sides[1]) else "<->"
    return problem.diagnostic("S104", f"`{text}` is no arrow; write `{arrow}`", start, start + len(text))


def _run_at(problem: Problem) -> tuple[str, int] | None:
    """The run of arrow characters that the parser stopped in, or just before (at a new line); its start."""
    place = problem.offset
    skipped = None if problem.found else _BLANK.match(problem.source.text, place, problem.end)
    if skipped:
        place = skipped.end()
    for match in _RUN.finditer(problem.source.text, problem.start, problem.end):
        if match.start() <= place < match.end():
            return match[0], match.start()
    return None


def _chained_comparison(problem: Problem) -> Diagnostic | None:
    if problem.found not in {"==", "!=", "<=", ">=", "<", ">"} or "AND" not in problem.expected:
        return None
    hint = "write `A < B and B < C`"
    for match in _CHAIN.finditer(problem.text):
        if match.start(4) == problem.offset - problem.start:
            a, first, b, second, c = match.groups()
            hint = f"write `{a} {first} {b} and {b} {second} {c}`"
    message = f"expected `and`, found `{problem.found}`: comparisons do not chain"
    return problem.diagnostic("S101", message, problem.offset, problem.offset + len(problem.found), hint)


def _space_in_name(problem: Problem) -> Diagnostic | None:
    """Two names side by side, one of which looks cut off: `layers. {i}`."""
    before = re.search(r"(\S+)[ \t]+$", problem.before)
    after = re.match(r"[^\s\[\]():,+]+", problem.source.text[problem.offset : problem.end])
    cut_here = set(problem.expected) & {"BOTH", "_FOR", "TO", "$END", "COLON"}
    if not before or not after or not cut_here or "TIMES" in problem.expected or not re.search(r"[\w.{/]", after[0]):
        return None
    looks_cut = before[1][-1] in "./" or after[0][0] in "./" or (before[1][-1] == "}" and after[0][0] == "{")
    if not looks_cut or not re.search(r"[\w./}]$", before[1]):
        return None
    hint = f"write `{before[1]}{after[0]}`"
    start = problem.start + before.start(1)
    return problem.diagnostic("S101", "a name holds no spaces", start, problem.offset + len(after[0]), hint)


def _open_string(problem: Problem) -> Diagnostic | None:
    if problem.found != '"':
        return None
    rest = problem.source.text[problem.offset + 1 : problem.end].split("\n")[0]
    message = "a string holds no backslash" if '"' in rest else "this string is never closed"
    return problem.diagnostic("S101", message, problem.offset, problem.offset + 1)


def _foreign_comment(problem: Problem) -> Diagnostic | None:
    if not problem.text.startswith(("//", "/*", "--")) or re.match(r"\S*[\w}]", problem.text):
        return None
    message = f"expected a statement, found `{problem.text[:2]}`"
    return problem.diagnostic("S101", message, problem.start, problem.start + 2, "a comment starts with `#`")


def _bad_hole(problem: Problem) -> Diagnostic | None:
    """A hole that is closed, but with something in it that ends no name: a string, `#`, another hole."""
    hole = re.compile(r"\{[^}\n]*\}").match(problem.source.text, problem.offset, problem.end)
    if not hole or problem.found[0] != "{" or problem.offset == problem.start:
        return None
    hint = "a hole holds an index, `{i+1}`, `{A[a]}`; an enumeration, `{j:w1|w3}`; `{*}` or `{..}`"
    return problem.diagnostic("S101", "this is no hole", hole.start(), hole.end(), hint)


_SPECIAL: list[Callable[[Problem], Diagnostic | None]] = [
    _foreign_comment,
    _unknown_arrow,
    _chained_comparison,
    _space_in_name,
    _open_string,
    _bad_hole,
]


def _hint(problem: Problem) -> str:
    """What to write instead, where that can be guessed."""
    found, before = problem.found, problem.before.split()
    if not before and found == "+":
        return "put the `+` at the end of the line before"
    if found in _OPENED_BY and problem.before.count(_OPENED_BY[found]) <= problem.before.count(found):
        return f"this `{found}` closes nothing"
    if "AXIS" in problem.expected and found in _INSTEAD_IN_SHAPES:
        return _INSTEAD_IN_SHAPES[found]
    if found == "[" and (tensor := _SHAPE_BEHIND_FORMATS.search(problem.before)):
        shape = re.compile(r"\[[^\]\n]*\]").match(problem.source.text, problem.offset, problem.end)
        return f"a shape stands before `as`: `{tensor[1]} {shape[0] if shape else '[...]'} as {tensor[2]}`"
    if "TIMES" in problem.expected and re.match(r"\.[0-9]", found):
        return "numbers in expressions are integers"
    if found[:1] in _INSTEAD and not re.match(r"[\w{]", found):
        return _INSTEAD[found[:1]]
    reserved = _RESERVED_ALONE.match(problem.text)
    if reserved and problem.offset <= problem.start + reserved.end():
        return f"`{reserved[1]}` at the start of a line begins a statement; a tensor cannot be named by this word alone"
    guess = _did_you_mean(found, before, problem.expected)
    if guess:
        return f"did you mean `{guess}`?"
    if "\n" in problem.before and problem.found:
        line = problem.source.position(problem.start)[0]
        return (
            f"this is one statement from line {line} on: a line that ends in `+`, `,` or an arrow goes on in the next"
        )
    return ""


def _did_you_mean(found: str, before: list[str], expected: set[str]) -> str:
    """A misspelled keyword: the one found, or the one that the line begins with."""
    words = [name.strip("_").lower() for name in expected if name not in _WORDS and name not in _EXPRESSION]
    close = get_close_matches(found, words, 1, 0.7) if found else []
    if not close and len(before) == 1 and before[0] not in STATEMENT_WORDS:
        close = get_close_matches(before[0], STATEMENT_WORDS, 1, 0.75)
    return close[0] if close else ""
