"""Names that generated code uses itself, so that no param or axis of a map may take them."""

from __future__ import annotations

# Attributes of mapdsl.runtime.adapter.Adapter (a test holds this list against the class) and Python's own.
ADAPTER_NAMES = frozenset(
    "MAP LEFT RIGHT accept complement convert_single_tensor left_keys read read_into right_keys set_params to_left "
    "to_right write write_into write_one".split()
)
# Local variables, functions and modules of generated functions.
LOCAL_NAMES = frozenset(
    "self take put config torch Tensor range len enumerate positions inv_freq name target number rest segment "
    "place float int str bool list tuple dict RAW".split()
)
