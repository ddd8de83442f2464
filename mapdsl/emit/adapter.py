"""The adapter module of a checked map: what fills `codegen/adapter.py.jinja`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mapdsl.compiler.check import Checked
from mapdsl.emit.codecs import constructor
from mapdsl.emit.context import Context
from mapdsl.emit.expressions import quoted
from mapdsl.emit.layout import INDENT, WIDTH, Bracketed, lines, listed
from mapdsl.emit.params import accept_code, file_name, params_code
from mapdsl.emit.rules import LEFT, RIGHT
from mapdsl.emit.sections import Directions
from mapdsl.resources import resource


def adapter_source(checked: Checked, command: str = "mapdsl compile", imports: Iterable[tuple[str, str]] = ()) -> str:
    """The Python source of the adapter; MapError for a map that is cut over ranks where that cannot be said in code.

    `imports` are more names that the module is to have, by the module that each is from.
    """
    return _AdapterEmitter(checked, command, imports).source().rstrip() + "\n"


def class_name(map_name: str) -> str:
    """`DeepseekV4Adapter` for `deepseek_v4`."""
    words = "".join(word.capitalize() for word in map_name.split("_"))
    return f"{words if words.isidentifier() else f'Map{words}'}Adapter"


def environment() -> Environment:
    """Jinja's environment over `codegen/`: undefined names are errors, and nothing is escaped (it writes Python)."""
    loader = FileSystemLoader(resource("codegen"))
    return Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


class _AdapterEmitter:
    def __init__(self, checked: Checked, command: str, imports: Iterable[tuple[str, str]]) -> None:
        self.map = checked.map
        self.command = command
        self.imports = imports
        self.context = Context(checked.map)
        self.directions = Directions(checked, self.context)

    def source(self) -> str:
        text = self.map.file.source.text
        left, right = self.map.left, self.map.right
        to_right, to_left = self._direction(LEFT), self._direction(RIGHT)
        params, accepts = params_code(self.context), accept_code(self.context)
        held = self.context.held
        has_keys = (left, right) != ("left", "right")
        base = "ShardedAdapter" if held.is_needed else "Adapter"
        codecs = self._codec_lines()
        body = "\n".join([*codecs, *params, *accepts, *to_right, *to_left])
        signatures = {
            "from_signature": (f"from_{left}", "state_dict: Mapping[str, Tensor]", "dict[str, Tensor]"),
            "to_signature": (f"to_{left}", "state_dict: Mapping[str, Tensor]", "dict[str, Tensor]"),
            "single_signature": (
                f"convert_single_tensor_to_{left}",
                "name: str, tensor: Tensor",
                "list[tuple[str, Tensor]]",
            ),
        }
        return (
            environment()
            .get_template("adapter.py.jinja")
            .render(
                title=f"Adapter of {self.map.name}: {left} <-> {right}.",
                source=file_name(self.map.file.source.path),
                digest=hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16],
                command=self.command,
                has_unflatten=".unflatten(" in body,
                imports="\n".join(self._imports(body, base, has_keys=has_keys)),
                codecs=codecs,
                class_name=class_name(self.map.name),
                base=base,
                name=self.map.name,
                left=left,
                right=right,
                quoted_name=quoted(self.map.name),
                quoted_left=quoted(left),
                quoted_right=quoted(right),
                meshes=held.table(),
                params=params,
                held=held.lines(),
                accepts=accepts,
                # A side that is called `left` has its keys from the base class.
                has_left_keys=left != "left",
                has_right_keys=right != "right",
                to_right=to_right,
                to_left=to_left,
                **{name: _signature(*words) for name, words in signatures.items()},
            )
        )

    def _imports(self, body: str, base: str, *, has_keys: bool) -> list[str]:
        wanted = _wanted(body, base, has_keys=has_keys, has_meshes=bool(self.map.meshes))
        for module, name in self.imports:
            wanted.setdefault(module, set()).add(name)
        return _import_lines(wanted)

    # --- declarations ---

    def _codec_lines(self) -> list[str]:
        out: list[str] = []
        for codec in self.context.codecs.values():
            out += lines(constructor(codec), 0, before=f"{self.context.constant(codec)} = ")
        for names, constant in self.context.alternatives.items():
            words = ["RAW" if name == "raw" else self.context.constant_named(name) for name in names]
            out += lines(listed(words), 0, before=f"{constant} = ")
        return ["", *out] if out else []

    # --- conversions ---

    def _direction(self, source: int) -> list[str]:
        """The method of one direction, and those of the bodies that it calls."""
        one, other = self.context.sides[source], self.context.sides[1 - source]
        name = ("_to_right", "_to_left")[source]
        out = [f"{INDENT}def {name}(self, take: Take, put: Put) -> None:", f'{INDENT * 2}"""`{one}` -> `{other}`."""']
        out += self.directions.code(source) or [f"{INDENT * 2}del take, put"]
        for body in self.directions.bodies:
            out += ["", *self._method(body.name, source, body.parameters(self.context.prefixes))]
            out += self.directions.body(body, source)
        return out

    def _method(self, name: str, source: int, prefixes: list[str]) -> list[str]:
        one, other = self.context.sides[source], self.context.sides[1 - source]
        items = ["self", "take: Take", "put: Put", *(f"{prefix}: str" for prefix in prefixes)]
        signature = Bracketed(f"{name}{('_to_right', '_to_left')[source]}", items)
        names = " and ".join(f"`{prefix}`" for prefix in prefixes)
        return [
            *lines(signature, 1, before="def ", after=" -> None:"),
            f'{INDENT * 2}"""`{one}` -> `{other}`, of the tensors under {names}."""',
        ]


def _signature(name: str, parameters: str, result: str) -> str:
    items = ["self", *re.split(r", (?=\w+:)", parameters), "**options: Any"]
    return "\n".join(lines(Bracketed(name, items), 1, before="def ", after=f" -> {result}:"))


def _wanted(body: str, base: str, *, has_keys: bool, has_meshes: bool) -> dict[str, set[str]]:
    """The names that the body uses, by module."""
    wanted = {
        "mapdsl.runtime.adapter": {"Tensor"} | ({"Keys"} if has_keys else set()),
        "mapdsl.runtime.config": {"Config"},
        "mapdsl.runtime.put": {"Put"},
        "mapdsl.runtime.take": {"Take"},
    }
    wanted.setdefault(_BASES[base], set()).add(base)
    if has_meshes:
        wanted["mapdsl.runtime.place"] = {"Meshes"}
    code = re.sub(r"^\s*#.*$", "", body, flags=re.MULTILINE)
    for module, names in USED.items():
        used = {name for name in names if re.search(rf"(?<![\w.\"]){name}(?!\w)", code)}
        if used:
            wanted.setdefault(module, set()).update(used)
    return wanted


def _import_lines(wanted: Mapping[str, Iterable[str]]) -> list[str]:
    """Import lines, sorted as linters want them."""
    out: list[str] = []
    for module, found in sorted(wanted.items()):
        listed_names = sorted(found, key=_import_order)
        one = f"from {module} import {', '.join(listed_names)}"
        out += [one] if len(one) <= WIDTH else lines(Bracketed("", listed_names), 0, before=f"from {module} import ")
    return out


def _import_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


_BASES = {"Adapter": "mapdsl.runtime.adapter", "ShardedAdapter": "mapdsl.runtime.sharded_adapter"}
# Names of the runtime that a body may use, by module.
USED = {
    "mapdsl.runtime.complement": ("RAW",),
    "mapdsl.runtime.fitting": ("compare", "only_copy", "only_zeros", "place"),
    "mapdsl.runtime.items": ("positions",),
    "mapdsl.runtime.names": ("Wide",),
    "mapdsl.runtime.values": ("inv_freq",),
    "mapdsl.runtime.codecs.block_scaled": ("BlockScaled",),
    "mapdsl.runtime.codecs.group_int": ("GroupInt",),
    "mapdsl.runtime.codecs.packed_int": ("PackedInt",),
    "mapdsl.runtime.codecs.values": ("Add", "Cast", "NarrowCast", "NegExp"),
}

__all__ = ["adapter_source", "class_name", "environment"]
