"""Diagnostics: what is wrong, where, the smallest case that shows it, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mapdsl.language.catalogue import CATALOGUE
from mapdsl.language.source import Span


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    `code` is a key of the catalogue, `message` the specific sentence. `spans` are the places in `.map` files, the
    first one leading. A finding on a checkpoint or a config has its file as `subject`; spans are the rules it breaks.
    """

    code: str
    message: str
    spans: tuple[Span, ...] = ()
    subject: str = ""
    witness: str = ""
    help: str = ""

    @property
    def severity(self) -> str:
        """`error`, `warning` or `lint`."""
        return CATALOGUE[self.code].severity

    @property
    def place(self) -> str:
        """Where the finding stands: a checkpoint's or config's path before the line of the map that it breaks."""
        return self.subject or (str(self.spans[0]) if self.spans else "")

    def sort_key(self) -> tuple[str, int, str, str]:
        """By file, position, code."""
        span = self.spans[0] if self.spans else None
        return (span.source.path if span else self.subject, span.start if span else 0, self.code, self.message)

    def as_json(self) -> dict[str, Any]:
        """A dict of plain values for `--json`."""
        places = [{"file": s.source.path, "line": s.line, "column": s.column, "text": s.text} for s in self.spans]
        return {
            "code": self.code,
            "name": CATALOGUE[self.code].name,
            "severity": self.severity,
            "message": self.message,
            "subject": self.subject,
            "places": places,
            "witness": self.witness,
            "help": self.help,
        }

    def render(self) -> str:
        """The finding as text: a head line, the source lines with carets, `witness:`, `help:`."""
        head = f"{self.severity}[{self.code}]: {printable(self.message)}"
        lines = [f"{printable(self.place)}: {head}" if self.place else head]
        width = max((len(str(s.line)) for s in self.spans), default=0)
        for number, span in enumerate(self.spans):
            if self.subject or (number and span.source is not self.spans[0].source):
                lines.append(f"{' ' * width} --> {printable(str(span))}")
            lines += _excerpt(span, width)
        for title, text in (("witness", self.witness), ("help", self.help)):
            if text:
                first, *rest = text.split("\n")
                lines.append(f"{title}: {printable(first)}")
                lines += [f"{' ' * (len(title) + 2)}{printable(line)}" for line in rest]
        return "\n".join(lines)


@dataclass
class MapError(ValueError):
    """Raised when a map, a config or a checkpoint is bad: holds every diagnostic of the run."""

    diagnostics: list[Diagnostic] = field(default_factory=list)

    def __str__(self) -> str:
        return render(self.diagnostics)


def error(code: str, message: str, *spans: Span, **fields: str) -> MapError:
    """A MapError with one diagnostic, ready to raise."""
    return MapError([Diagnostic(code, message, spans, **fields)])


def render(diagnostics: Iterable[Diagnostic]) -> str:
    """All diagnostics as text, sorted by place."""
    return "\n\n".join(d.render() for d in ordered(diagnostics))


def ordered(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Sorted by file, position and code; each finding once."""
    return sorted(dict.fromkeys(diagnostics), key=Diagnostic.sort_key)


def has_errors(diagnostics: Iterable[Diagnostic]) -> bool:
    """Whether one of them is an error, not a warning or a lint."""
    return any(d.severity == "error" for d in diagnostics)


def printable(text: str, limit: int = 400) -> str:
    """Text that is safe to print: control characters escaped, absurd lengths cut in the middle."""
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]}...({len(text) - limit} characters)...{text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _excerpt(span: Span, width: int) -> list[str]:
    """The line of a span with carets below it; a span of several lines shows its first."""
    line, column = span.source.position(span.start)
    text = span.source.line(line)
    length = max(1, min(span.end - span.start, len(text) - column + 1))
    shift = max(0, column - 60) if len(text) > 160 else 0
    shown = text[shift : shift + 160]
    carets = "^" * min(length, max(1, len(shown) - (column - 1 - shift)))
    return [
        f"{line:>{width}} | {printable(shown)}",
        f"{' ' * width} | {' ' * (column - 1 - shift)}{carets}",
    ]
