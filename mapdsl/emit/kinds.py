"""What the params of a map are used as, so that a config with values of the wrong kind is refused by name."""

from __future__ import annotations

from mapdsl.compiler import ir
from mapdsl.language import tree

# Methods of the runtime's Config, the more telling first.
KINDS = ("table", "numbers", "items", "count", "size", "number", "real", "flag", "param")
_ORDER = ("<", "<=", ">", ">=")


def param_kinds(resolved: ir.Map) -> dict[str, str]:
    """The kind of every param: how many of something, a size, a list, ..."""
    return _Kinds(resolved).run()


class _Kinds:
    def __init__(self, resolved: ir.Map) -> None:
        self.map = resolved
        self.found = dict.fromkeys(resolved.params, "param")

    def run(self) -> dict[str, str]:
        for index in self.map.indices.values():
            for bound in (index.lower, index.upper):
                if bound is not None:
                    self._walk(bound, "count")
        for rule in self.map.rules:
            if rule.guard is not None:
                self._walk(rule.guard, "flag")
            for tensor in (*rule.left, *rule.right):
                self._tensor(tensor)
            if rule.value is not None and isinstance(rule.value.content, tree.Generator):
                for argument in rule.value.content.arguments:
                    self._walk(argument, "real")
        for accept in self.map.accepts:
            if accept.guard is not None:
                self._walk(accept.guard, "flag")
        # A param's own definition says what the params before it are.
        for name, param in reversed(self.map.params.items()):
            for option in param.value.options if isinstance(param.value, tree.Default) else (param.value,):
                self._walk(option, "size" if self.found[name] == "count" else self.found[name])
        return self.found

    def _tensor(self, tensor: ir.Tensor) -> None:
        for axis in ir.axes_of(tensor.shape) if tensor.shape else ():
            if axis.name in self.map.params:
                self._note(axis.name, "size")
        for part in tensor.template.parts:
            if isinstance(part, tree.NumberHole):
                self._walk(part.value, "table" if isinstance(part.value, tree.Lookup) else "size")

    def _note(self, name: str, kind: str) -> None:
        if name in self.found and KINDS.index(kind) < KINDS.index(self.found[name]):
            self.found[name] = kind

    def _walk(self, expr: tree.Expr, kind: str) -> None:
        """Note what an expression's params are, where the expression itself is of a kind."""
        number = kind if kind in ("count", "size", "real") else "number"
        match expr:
            case tree.Name(path=name):
                self._note(name, "size" if kind == "count" and self._is_config_field(name) else kind)
            case tree.Lookup(value=items, index=index):
                lists = {"table": "table", "count": "numbers", "size": "numbers", "number": "numbers", "real": "items"}
                self._walk(items, lists.get(kind, "items"))
                self._walk(index, "size")
            case tree.Call(function="len", arguments=(items,)):
                self._walk(items, "items")
            case tree.Call(function="positions", arguments=(items, value)):
                self._walk(items, "items")
                self._walk(value, "param")
            case tree.Operation(operator="and" | "or" | "not", operands=operands):
                for operand in operands:
                    self._walk(operand, "flag")
            case tree.Operation(operator="in", operands=(item, items)):
                self._walk(item, "param")
                self._walk(items, "items")
            case tree.Operation(operator="==" | "!=", operands=operands):
                self._compared(operands)
            case tree.Operation(operator=operator, operands=operands):
                for operand in operands:
                    self._walk(operand, "number" if operator in _ORDER else "size" if number == "count" else number)

    def _compared(self, operands: tuple[tree.Expr, ...]) -> None:
        """Anything may be compared; what a computed number is compared with need not be one."""
        for operand in operands:
            if not isinstance(operand, tree.Name):
                self._walk(operand, "param")

    def _is_config_field(self, name: str) -> bool:
        return name not in self.map.params
