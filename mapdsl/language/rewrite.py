"""Rebuilding a tree with some of its nodes replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

from mapdsl.language.tree import Node

AnyNode = TypeVar("AnyNode")


def rewrite(node: AnyNode, change: Callable[[Any], Any]) -> AnyNode:
    """The tree with `change` applied to every node, innermost first; nodes that stay the same are shared."""
    if isinstance(node, tuple):
        items = tuple(rewrite(item, change) for item in node)
        same = all(new is old for new, old in zip(items, node, strict=True))
        return node if same else items  # type: ignore[return-value]
    if not isinstance(node, Node):
        return node
    updates = {}
    for item in fields(node):
        if item.name != "span":
            old = getattr(node, item.name)
            new = rewrite(old, change)
            if new is not old:
                updates[item.name] = new
    return change(replace(node, **updates) if updates else node)  # type: ignore[no-any-return]
