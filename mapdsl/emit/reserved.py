"""Names that generated code uses itself, so that no param or axis of a map may take them."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable

# Attributes of mapdsl.runtime's Adapter and ShardedAdapter (a test holds this list against the classes).
ADAPTER_NAMES = frozenset(
    (
        "MAP",
        "LEFT",
        "RIGHT",
        "MESHES",
        "accept",
        "at",
        "complement",
        "config",
        "counted_from",
        "counting_from_all",
        "found",
        "from_dtensors",
        "held",
        "held_padded",
        "left_keys",
        "left_names",
        "list_shares",
        "listed_left",
        "listed_right",
        "look",
        "merge",
        "mesh_rank",
        "mesh_size",
        "partial",
        "place",
        "read",
        "read_into",
        "reshard",
        "right_keys",
        "right_names",
        "set_params",
        "shard",
        "to_dtensors",
        "unpadded",
        "write",
        "write_into",
        "write_one",
    )
)
# Local variables, keyword arguments, functions and modules of generated functions.
LOCAL_NAMES = frozenset(
    (
        "self",
        "take",
        "put",
        "config",
        "torch",
        "Tensor",
        "Mapping",
        "Any",
        "Adapter",
        "Keys",
        "Config",
        "Put",
        "Take",
        "Wide",
        "RAW",
        "range",
        "len",
        "enumerate",
        "positions",
        "inv_freq",
        "only_copy",
        "only_zeros",
        "compare",
        "place",
        "narrower",
        "BlockScaled",
        "Add",
        "Cast",
        "GroupInt",
        "NarrowCast",
        "PackedInt",
        "NegExp",
        "name",
        "target",
        "number",
        "rest",
        "segment",
        "key",
        "shape",
        "stored",
        "optional",
        "into",
        "copy",
        "but",
        "int",
        "dict",
        "list",
        "operands",
        "view",
        "annotations",
        "print",
        "type",
        "float",
        "str",
        "bool",
        "tuple",
        "set",
    )
)


def unclashed(name: str, reserved: Iterable[str]) -> str:
    """The name, or the name with one more `_` where it is reserved; two names never become one."""
    bare = name.rstrip("_")
    return f"{name}_" if bare in reserved or keyword.iskeyword(bare) or not bare else name


def attribute(name: str, methods: Iterable[str] = ()) -> str:
    """The attribute of the adapter that holds a param; `methods` are those that the map's sides give their names."""
    if name.startswith("_"):
        return f"param{name}"  # never private, never one of Python's own
    taken = name if name.startswith("param_") else unclashed(name, ADAPTER_NAMES | frozenset(methods))
    return f"param_{taken}" if name.startswith("param_") else taken


def local(name: str) -> str:
    """The local variable of an index, an enumeration or a free axis."""
    return unclashed(name, LOCAL_NAMES)


def fresh(wanted: str, taken: set[str], fits: Callable[[str], bool] = lambda name: True) -> str:
    """A variable's name that is not taken yet, and fits; it is taken from now on."""
    number = 2
    name = unclashed(wanted, LOCAL_NAMES)
    while name in taken or not fits(name):
        name, number = f"{wanted}{number}", number + 1
    taken.add(name)
    return name
