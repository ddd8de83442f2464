"""From the syntax tree back to text: every node in its canonical spelling, on one line.

Parentheses stand only where precedence needs them, so that parsing the text gives the same tree. Layout (alignment,
broken lines, comments) is the formatter's work.
"""

from __future__ import annotations

from mapdsl.language import tree

# How tightly an expression binds; an operand that binds less tightly than its place asks for gets parentheses.
_DEFAULT, _OR, _AND, _NOT, _COMPARISON, _SUM, _TERM, _UNARY, _ATOM = range(9)
_LEVELS = {"or": _OR, "and": _AND, "not": _NOT, "+": _SUM, "-": _SUM, "*": _TERM, "//": _TERM, "%": _TERM}


def unparse_expression(expression: tree.Expr) -> str:
    """`E * (k + 1)`; the operand of `param`, `where`, a lookup, an argument."""
    return _expression(expression, _DEFAULT, " ")


def unparse_template(template: tree.Template) -> str:
    """`layers.{i+1}.{j:w1|w3}`; `.` for the empty prefix."""
    return "".join(_part(part) for part in template.parts) or "."


def unparse_shape(shape: tree.Shape) -> str:
    """`[(g (r c + c + c)) d]`."""
    return f"[{' '.join(_dimension(dimension) for dimension in shape.dimensions)}]"


def unparse_tensor(tensor: tree.Tensor) -> str:
    """`wq.weight [f d] as fp8|raw`."""
    text = unparse_template(tensor.template)
    if tensor.shape is not None:
        text += f" {unparse_shape(tensor.shape)}"
    if tensor.codecs:
        text += f" as {'|'.join(map(_codec_use, tensor.codecs))}"
    return text


def unparse_side(tensors: tuple[tree.Tensor, ...]) -> str:
    """`q.weight [f d] + k.weight [f d]`; `_` for no tensor."""
    return " + ".join(map(unparse_tensor, tensors)) or "_"


def unparse_value(value: tree.Value) -> str:
    """`= 1.0`, `~ inv_freq(rope_theta, c)`, `= model.embed_tokens.weight`."""
    content = value.content
    if isinstance(content, tree.Generator):
        text = f"{content.name}({_list(content.arguments)})"
    elif isinstance(content, tree.Template):
        text = unparse_template(content)
    else:
        text = _number(content.value)
    return f"{'=' if value.compared else '~'} {text}"


def unparse_target(rule: tree.Rule) -> str:
    """What stands behind a rule's arrow: its right side, and the value of an absent side."""
    text = unparse_side(rule.right)
    return f"{text} {unparse_value(rule.value)}" if rule.value else text


def unparse_modifiers(rule: tree.Rule) -> str:
    """`else optional where i < H`, or an empty string."""
    words = ["else"] * rule.is_else + ["optional"] * rule.optional
    if rule.guard is not None:
        words.append(f"where {unparse_expression(rule.guard)}")
    return " ".join(words)


def unparse_rule(rule: tree.Rule) -> str:
    """A whole rule on one line."""
    text = f"{unparse_side(rule.left)} {rule.arrow} {unparse_target(rule)}"
    modifiers = unparse_modifiers(rule)
    return f"{text} {modifiers}" if modifiers else text


def unparse_pair(pair: tree.Pair, *, short: bool = True) -> str:
    """`layers.{i} <-> model.layers.{i} where i < H`; with `short`, one prefix where both are the same."""
    text = unparse_template(pair.left)
    if pair.left != pair.right or not short:
        text += f" <-> {unparse_template(pair.right)}"
    return text + _where(pair.guard)


def unparse_header(header: tree.Header) -> str:
    """`map deepseek_v4: hf <-> native`."""
    return f"map {header.name}: {header.left} <-> {header.right}"


def unparse_statement(statement: tree.Statement | tree.Header, depth: int = 0) -> str:
    """A statement as lines without a newline at the end; only a block has more than one."""
    indent = "    " * depth
    if not isinstance(statement, tree.Block):
        return indent + _statement(statement)
    heads = f",\n{indent}".join(map(unparse_pair, statement.pairs))
    return "\n".join([f"{indent}{heads}:", *(unparse_statement(child, depth + 1) for child in statement.body)])


def unparse_file(file: tree.File) -> str:
    """A whole file without its comments and blank lines; `format` keeps those."""
    lines = [unparse_header(file.header)] if file.header else []
    return "\n".join([*lines, *map(unparse_statement, file.statements)]) + "\n"


# --- statements ---


def _statement(statement: tree.Statement | tree.Header) -> str:
    match statement:
        case tree.Header():
            return unparse_header(statement)
        case tree.Rule():
            return unparse_rule(statement)
        case tree.Param(name=name, value=tree.Name(path=path)) if path == name:
            return f"param {name}"
        case tree.Param(name=name, value=value):
            return f"param {name} = {unparse_expression(value)}"
        case tree.Index():
            return f"index {_range(statement)}"
        case tree.Codec(name=name, kind=kind, arguments=arguments):
            return f"codec {name} = {kind}({_arguments(arguments)})"
        case tree.Mesh(name=name, axes=axes):
            return f"mesh {name} shards {', '.join(map(_mesh_axis, axes))}"
        case tree.Accept(old=old, new=new, guard=guard):
            return f"accept {unparse_template(old)} for {unparse_template(new)}{_where(guard)}"
        case tree.Include():
            return _include(statement)
        case tree.Override(rule=rule):
            return f"override {unparse_rule(rule)}"
        case tree.Remove(template=template):
            return f"remove {unparse_template(template)}"
        case tree.Example(name=name, arrow=arrow, target=target):
            return f"example {name} {arrow} {'error' if target is None else target}"
        case tree.Law(path=path, grade=grade):
            return f"law {' -> '.join(path)}: {grade}"
        case tree.Block():
            raise TypeError("a block has more than one line")


def _range(index: tree.Index) -> str:
    # Bounds are sums: a comparison or weaker needs parentheses there.
    lower = None if index.lower is None else _expression(index.lower, _SUM, " ")
    if index.upper is None:
        return f"{index.name} >= {lower}"
    upper = _expression(index.upper, _SUM, " ")
    return f"{index.name} < {upper}" if lower is None else f"{lower} <= {index.name} < {upper}"


def _mesh_axis(axis: tree.MeshAxis) -> str:
    marks = [" unevenly"] * axis.uneven + [" by ceil"] * axis.by_ceil + [" or copies"] * axis.copies
    return axis.name + "".join(marks)


def _include(include: tree.Include) -> str:
    text = f'include "{include.path}"'
    if include.bindings:
        text += " with " + ", ".join(f"{b.name} = {unparse_expression(b.value)}" for b in include.bindings)
    return text + _where(include.guard)


def _where(guard: tree.Expr | None) -> str:
    return "" if guard is None else f" where {unparse_expression(guard)}"


def _codec_use(use: tree.CodecUse) -> str:
    return f"{use.name}({_arguments(use.arguments)})" if use.arguments else use.name


def _arguments(arguments: tuple[tree.Argument, ...]) -> str:
    return ", ".join(map(_argument, arguments))


def _argument(argument: tree.Argument) -> str:
    value = argument.value
    match value:
        case tuple():
            text = "|".join(value)
        case str():
            text = f'"{value}"'
        case _:
            text = _number(value)
    return text if argument.name is None else f"{argument.name}={text}"


def _number(value: int | float) -> str:
    return repr(value)


# --- names ---


def _part(part: tree.Part) -> str:
    match part:
        case tree.Text(text=text):
            return text
        case tree.NumberHole(value=value, local=local, repeat=repeat):
            word = "local " if local else "repeat " if repeat else ""
            return f"{{{word}{_expression(value, _SUM, '')}}}"
        case tree.EnumHole(name=name, spellings=spellings, repeat=repeat):
            return f"{{{'repeat ' if repeat else ''}{name}:{'|'.join(spellings)}}}"
        case tree.WildcardHole(name=name, many=many):
            return f"{{{'' if name is None else name + ':'}{'..' if many else '*'}}}"


# --- shapes ---


def _dimension(dimension: tree.Dimension) -> str:
    match dimension:
        case tree.Axis():
            return _axis(dimension)
        case tree.Pad(axis=axis, multiple=multiple):
            return f"pad({_axis(axis)}, {_expression(multiple, _SUM, ' ')})"
        case tree.Product() | tree.Sum():
            return f"({_terms(dimension)})"  # of zeros that are no term, too, as it was written


def _terms(node: tree.Axis | tree.Product | tree.Sum) -> str:
    match node:
        case tree.Axis():
            return _axis(node)
        case tree.Product(factors=factors, zeros=zeros):
            text = " ".join(_dimension(factor) for factor in factors)
            return f"zeros({text})" if zeros else text
        case tree.Sum(terms=terms):
            return " + ".join(_terms(term) for term in terms)


def _axis(axis: tree.Axis) -> str:
    if axis.name is None:
        return str(axis.size)
    return f"repeat {axis.name}" if axis.repeat else axis.name


# --- expressions ---


def _expression(expression: tree.Expr, level: int, space: str) -> str:
    """The text of an expression at a place that asks for `level`; `space` stands around arithmetic operators."""
    text = _bare(expression, space)
    return f"({text})" if _level(expression) < level else text


def _level(expression: tree.Expr) -> int:
    match expression:
        case tree.Default():
            return _DEFAULT
        case tree.Operation(operator="-", operands=(_,)):
            return _UNARY
        case tree.Operation(operator="not", operands=(tree.Operation(operator="in"),)):
            return _COMPARISON
        case tree.Operation(operator=operator):
            return _LEVELS.get(operator, _COMPARISON)
        case tree.Number(value=value) if value < 0:
            return _UNARY
    return _ATOM


def _bare(expression: tree.Expr, space: str) -> str:
    match expression:
        case tree.Number(value=value):
            return _number(value)
        case tree.String(value=text):
            return f'"{text}"'
        case tree.Boolean(value=truth):
            return "true" if truth else "false"
        case tree.ListLiteral(items=items):
            return f"[{_list(items)}]"
        case tree.Name(path=path):
            return path
        case tree.Lookup(value=value, index=index):
            return f"{_expression(value, _ATOM, space)}[{_expression(index, _OR, space)}]"
        case tree.Call(function=function, arguments=arguments):
            return f"{function}({_list(arguments, space)})"
        case tree.Has(template=template):
            return f"has({unparse_template(template)})"
        case tree.Default(options=options):
            return " ?? ".join(_expression(option, _OR, " ") for option in options)
        case tree.Operation():
            return _operation(expression, space)


def _list(items: tuple[tree.Expr, ...], space: str = " ") -> str:
    return f",{space}".join(_expression(item, _OR, space) for item in items)


def _operation(operation: tree.Operation, space: str) -> str:
    operator, operands = operation.operator, operation.operands
    level = _level(operation)
    if level == _UNARY:
        return f"-{_expression(operands[0], _UNARY, space)}"
    if operator == "not":
        inner = operands[0]
        if isinstance(inner, tree.Operation) and inner.operator == "in":
            left, right = inner.operands
            return f"{_expression(left, _SUM, space)} not in {_expression(right, _SUM, space)}"
        return f"not {_expression(inner, _NOT, space)}"
    if level == _COMPARISON:
        around = " " if operator == "in" else space
        return f"{around}{operator}{around}".join(_expression(operand, _SUM, space) for operand in operands)
    if level in (_OR, _AND):
        # A nested `or` within an `or` is a tree of its own.
        return f" {operator} ".join(_expression(operand, level + 1, space) for operand in operands)
    # Chains group to the left.
    first, *rest = operands
    texts = [_expression(first, level, space), *(_expression(operand, level + 1, space) for operand in rest)]
    return f"{space}{operator}{space}".join(texts)
