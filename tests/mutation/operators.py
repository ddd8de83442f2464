"""Small faults, planted one at a time in the text of a map: what somebody who writes one could get wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ARROW = re.compile(r" +(<->|->|<-) +")
SHAPE = re.compile(r"\[([^\[\]]*)\]")
SPELLED = re.compile(r"\{(\w+):([^{}*]*\|[^{}]*)\}")
SEGMENT = re.compile(r"[A-Za-z]\w*")
NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.x])")


@dataclass(frozen=True)
class Mutant:
    """A map with one fault: which kind, on which line, what stood there and what stands there now."""

    operator: str
    line: int
    before: str
    after: str
    text: str

    @property
    def name(self) -> str:
        """What tells a mutant from all others, whatever its line number: the change itself."""
        return f"{self.operator}: {squeezed(self.before)} => {squeezed(self.after)}"


def mutants(text: str) -> Iterator[Mutant]:
    """Every mutant of a map, each text once. Comments, `map` and `example` lines are left alone."""
    lines = text.split("\n")
    seen = {text}
    for number, line in enumerate(lines):
        if not line.strip() or line.lstrip().startswith(("#", "map ", "example ")):
            continue
        for operator, changed in _line_mutants(lines, number):
            after = [*lines[:number], *changed, *lines[number + len(changed or [""]) :]]
            mutated = "\n".join(after)
            if mutated not in seen:
                seen.add(mutated)
                shown = " / ".join(changed) or "(nothing)"
                yield Mutant(
                    operator, number + 1, " / ".join(lines[number : number + len(changed or [""])]), shown, mutated
                )


def squeezed(text: str) -> str:
    """Text without the spaces that align it, and without its comment."""
    return " ".join(text.split(" #")[0].split())


def _line_mutants(lines: list[str], number: int) -> Iterator[tuple[str, list[str]]]:
    """Mutants of one line, as the operator and the lines that stand for it."""
    line = lines[number]
    word = line.split()[0]
    if word in ("param", "index", "codec", "accept"):
        yield f"{word} dropped", []
        for operator, changed in _DECLARATIONS[word](line):
            yield operator, [changed]
        return
    if line.rstrip().endswith((":", ",")):
        for changed in _guards(line):
            yield "block guard", [changed]
        for changed in _segments(line):
            yield "block prefix", [changed]
        return
    yield "rule dropped", []
    for operator, mutate in _RULES.items():
        for changed in mutate(line):
            yield operator, [changed]
    below = lines[number + 1] if number + 1 < len(lines) else ""
    if _is_rule(below) and not below.lstrip().startswith(("accept", "example")):
        for side in (0, 2):
            swapped = _swapped(line, below, side)
            # The order of lines means nothing.
            if sorted(map(squeezed, swapped)) != sorted(map(squeezed, (line, below))):
                yield "names swapped", swapped


def _is_rule(line: str) -> bool:
    return bool(ARROW.search(line)) and not line.lstrip().startswith("#") and not line.rstrip().endswith((":", ","))


def _parts(line: str) -> tuple[str, str, str]:
    """Left side, arrow, and what is behind it; of a line without an arrow all is left."""
    found = ARROW.search(line)
    return (line[: found.start()], found[0], line[found.end() :]) if found else (line, "", "")


def _template(side: str) -> str:
    """The name template that a side begins with."""
    return side.strip().split()[0]


def _swapped(line: str, below: str, side: int) -> list[str]:
    """Two neighbours with their names on one side exchanged."""
    one, other = _template(_parts(line)[side]), _template(_parts(below)[side])
    return [_with_side(line, side, one, other), _with_side(below, side, other, one)]


def _with_side(line: str, side: int, old: str, new: str) -> str:
    parts = list(_parts(line))
    parts[side] = parts[side].replace(old, new, 1)
    return "".join(parts)


def _body(line: str) -> tuple[str, str]:
    """A rule and its guard."""
    before, where, guard = line.partition(" where ")
    return before, where + guard


# --- rules ---------------------------------------------------------------------------------------------------------


def _segments(line: str) -> Iterator[str]:
    """One word of a name misspelled."""
    body, guard = _body(line)
    for side, text in enumerate(_parts(body)):
        if side == 1 or text.split()[:1] in ([], ["_"]):
            continue
        name = _template(text).rstrip(",:")
        holes = [hole.span() for hole in re.finditer(r"\{[^{}]*\}", name)]
        for word in SEGMENT.finditer(name):
            if any(a <= word.start() < b for a, b in holes):
                continue
            changed = f"{name[: word.end()]}x{name[word.end() :]}"
            yield _with_side(body, side, name, changed) + guard


def _enumerations(line: str) -> Iterator[str]:
    """Two spellings of an enumeration exchanged, on one side; spelled once, they are the same on both."""
    for found in SPELLED.finditer(line):
        if f"{{{found[1]}}}" in line:
            continue
        words = found[2].split("|")
        for n in range(len(words) - 1):
            swapped = [*words[:n], words[n + 1], words[n], *words[n + 2 :]]
            yield f"{line[: found.start(2)]}{'|'.join(swapped)}{line[found.end(2) :]}"


def _axes(line: str) -> Iterator[str]:
    """Two dimensions of a shape exchanged, or two axes of a dimension where another shape has them too."""
    body, guard = _body(line)
    for found in SHAPE.finditer(body):
        dimensions = re.findall(r"\([^()]*\)|\S+", found[1])
        for n in range(len(dimensions) - 1):
            swapped = [*dimensions[:n], dimensions[n + 1], dimensions[n], *dimensions[n + 2 :]]
            yield f"{body[: found.start(1)]}{' '.join(swapped)}{body[found.end(1) :]}{guard}"
        for dimension in dimensions:
            if dimension.startswith("(") and len(SHAPE.findall(body)) > 1:
                turned = f"({' '.join(reversed(dimension[1:-1].split()))})"
                yield f"{body[: found.start(1)]}{found[1].replace(dimension, turned, 1)}{body[found.end(1) :]}{guard}"


def _sizes(line: str) -> Iterator[str]:
    """One axis given another size."""
    body, guard = _body(line)
    for found in SHAPE.finditer(body):
        for axis in re.finditer(r"\w+", found[1]):
            start, end = found.start(1) + axis.start(), found.start(1) + axis.end()
            wrong = str(int(axis[0]) + 1) if axis[0].isdigit() else "E" if axis[0] != "E" else "A"
            yield f"{body[:start]}{wrong}{body[end:]}{guard}"


def _guards(line: str) -> Iterator[str]:
    """A guard off by one, turned round, joined otherwise, or left out."""
    body, where, rest = line.partition(" where ")
    if not where:
        return
    guard = rest.rstrip(",:")
    end = rest[len(guard) :]
    yield body.rstrip() + end
    swaps = [("<", "<="), (">=", ">"), (">", ">="), ("==", "!="), ("and", "or"), ("or", "and")]
    swaps += [("not in", "in"), ("in", "not in"), ("<", ">="), (">=", "<")]
    for old, new in swaps:
        for found in re.finditer(rf"(?<= ){old}(?= )", guard):
            if old == "in" and guard[: found.start()].endswith("not "):
                continue
            yield f"{body}{where}{guard[: found.start()]}{new}{guard[found.end() :]}{end}"
    for found in NUMBER.finditer(guard):
        yield f"{body}{where}{guard[: found.start()]}{int(found[0]) + 1}{guard[found.end() :]}{end}"
    for found in re.finditer(r"\bH\b|\bstated\b", guard):
        for change in ("+ 1", "- 1"):
            yield f"{body}{where}{guard[: found.end()]} {change}{guard[found.end() :]}{end}"


def _formats(line: str) -> Iterator[str]:
    """One of the formats left out, all of them, or another put first; the order behind the first means nothing."""
    for found in re.finditer(r" as ([\w|]+)", line):
        words = found[1].split("|")
        yield line[: found.start()] + line[found.end() :]
        for n in range(len(words)):
            yield f"{line[: found.start(1)]}{'|'.join(words[:n] + words[n + 1 :])}{line[found.end(1) :]}"
            if n:
                swapped = [words[n], *words[:n], *words[n + 1 :]]
                yield f"{line[: found.start(1)]}{'|'.join(swapped)}{line[found.end(1) :]}"


def _modifiers(line: str) -> Iterator[str]:
    """`optional` and `else` left out or put in, an arrow that goes one way."""
    for word in (" optional", " else"):
        if word in line:
            yield line.replace(word, "", 1)
    if " <-> " in line and " optional" not in line and " else" not in line and " where " not in line:
        yield line.rstrip() + " optional"
    left, arrow, _ = _parts(line)
    if arrow.strip() == "<->":
        yield f"{left} -> _"


def _offsets(line: str) -> Iterator[str]:
    """A number in a name off by one."""
    for found in re.finditer(r"\{(L\+)?[ikxe]\}", line):
        yield f"{line[: found.end() - 1]}+1{line[found.end() - 1 :]}"


_RULES: dict[str, Callable[[str], Iterator[str]]] = {
    "name misspelled": _segments,
    "spellings swapped": _enumerations,
    "axes swapped": _axes,
    "size changed": _sizes,
    "guard changed": _guards,
    "formats changed": _formats,
    "modifier changed": _modifiers,
    "number shifted": _offsets,
}

# --- declarations --------------------------------------------------------------------------------------------------


def _param(line: str) -> Iterator[tuple[str, str]]:
    head, _, value = line.partition("=")
    value = value.split("  #")[0].strip()
    options = value.split(" ?? ")
    for n in range(len(options) if len(options) > 1 else 0):
        yield "option dropped", f"{head}= {' ?? '.join(options[:n] + options[n + 1 :])}"
    for found in NUMBER.finditer(value):
        yield "number changed", f"{head}= {value[: found.start()]}{int(found[0]) + 1}{value[found.end() :]}"
    for old, new in ((" * ", " + "), (" // ", " * "), (" + ", " * ")):
        if old in value:
            yield "operator changed", f"{head}= {value.replace(old, new, 1)}"
    for found in re.finditer(r'"(\w+)"', value):
        yield "string changed", f"{head}= {value[: found.end(1)]}x{value[found.end(1) :]}"
    for found in re.finditer(
        r"[a-z]\w+(?![\w(\"])", re.sub(r'"\w+"', lambda m: '"' + " " * (len(m[0]) - 2) + '"', value)
    ):
        wrong = "num_attention_heads" if found[0] != "num_attention_heads" else "num_hidden_layers"
        yield "field changed", f"{head}= {value[: found.start()]}{wrong}{value[found.end() :]}"


def _index(line: str) -> Iterator[tuple[str, str]]:
    code = line.split("  #")[0].rstrip()
    yield "bound changed", f"{code} + 1"
    if " < " in code:
        yield "bound changed", f"{code} - 1"
        yield "bound changed", code.replace("index ", "index 1 <= ")
    else:
        yield "bound changed", re.sub(r" >= .*", " >= 0", code)


def _codec(line: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"(\d+)x(\d+)", line):
        one, other = int(found[1]), int(found[2])
        for block in (f"{one * 2}x{other}", f"{one}x{other * 2}", f"{one}x{other // 2}", f"*x{other}"):
            yield "block changed", f"{line[: found.start()]}{block}{line[found.end() :]}"
    for old, new in (("f8e4m3", "f8e5m2"), ("f4e2m1", "f8e4m3"), ("packed=i8", "packed=u8")):
        if old in line:
            yield "element changed", line.replace(old, new, 1)
    for old, new in (
        ("{stem}.scale", "{key}.scale"),
        ("{key}_scale_inv", "{key}_scale"),
        ("{stem}.scale", "{stem}.scales"),
    ):
        if old in line:
            yield "companion renamed", line.replace(old, new, 1)
    for found in re.finditer(r"scale_dtype=([\w|]+)", line):
        words = found[1].split("|")
        yield "scale dtypes changed", line[: found.start() - 2] + line[found.end() :]
        for n in range(len(words) if len(words) > 1 else 0):
            kept = "|".join(words[:n] + words[n + 1 :])
            yield "scale dtypes changed", f"{line[: found.start(1)]}{kept}{line[found.end(1) :]}"
        yield "scale dtypes changed", f"{line[: found.start(1)]}{'|'.join(words[1:] + words[:1])}{line[found.end(1) :]}"


def _accept(line: str) -> Iterator[tuple[str, str]]:
    for changed in _offsets(line):
        yield "number shifted", changed
    _, old, new = line.split(" ", 1)[0], *line.removeprefix("accept ").split(" for ")
    for name in (old, new):
        for word in SEGMENT.finditer(re.sub(r"\{[^{}]*\}", lambda m: "0" * len(m[0]), name)):
            yield "name misspelled", line.replace(name, f"{name[: word.end()]}x{name[word.end() :]}", 1)


_DECLARATIONS: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "param": _param,
    "index": _index,
    "codec": _codec,
    "accept": _accept,
}
