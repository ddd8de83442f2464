"""The config.json of what is written: with a `quantization_config` where tensors are stored quantised, and only there.

A loader goes by that field: where it is left in, plain tensors are taken for quantised ones, and where it is missing,
quantised ones for plain ones. Nothing else of the text is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mapdsl.checkpoint.json_members import with_member, without_members
from mapdsl.checkpoint.passes import Plan, outputs_of
from mapdsl.checkpoint.written import declared_formats, written_formats
from mapdsl.compiler import ir
from mapdsl.compiler.codecs import parse_codec
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.codecs.storage import BlockStorage

FIELD = "quantization_config"

_PACKED = ("U8", "I8")  # besides the narrow floats: what quantised payloads are stored as
_FP8_NAMES = ("m.weight_scale_inv", "m.scale")  # the scales of `m.weight` that transformers' FP8 loader knows
_FP8_SCALES = {"f32": "float", "f8e8m0": "ue8m0", "u8": "ue8m0"}


@dataclass(frozen=True)
class ModelConfig:
    """The text of a config.json, and what was changed in it: dotted paths of members `removed`, and the one `added`.

    `lacks` says what a loader will miss, where mapdsl cannot tell it.
    """

    text: str
    removed: tuple[str, ...] = ()
    added: str = ""
    lacks: str = ""


def written_config(plan: Plan) -> ModelConfig | None:
    """The config.json of what a plan writes; None where the source has none."""
    text = plan.config_text
    if plan.to_right:
        return None if text is None else _of_right(plan, text)
    if plan.side is not None and text == plan.side.origin.config_text:
        return None if text is None else ModelConfig(text)  # that of the same tensors, as it was
    return _of_left(plan, text)


def _of_right(plan: Plan, text: str) -> ModelConfig:
    """Without the field, if the map decodes what is quantised, all of it."""
    decoded = _quantised(plan, set(plan.formats.values()))
    still = [name for name, dtype, shape in plan.entries if looks_quantised(dtype, shape)]
    if not decoded or still or _writes_quantised(plan):
        lacks = ""
        if decoded and without_members(text, FIELD)[1]:
            of = f"`{still[0]}`" if still else "of the map"
            lacks = f"its {FIELD} is that of the source, though not all is stored so any more; see {of}"
        return ModelConfig(text, lacks=lacks)
    changed, removed = without_members(text, FIELD)
    return ModelConfig(changed, tuple(removed))


def _of_left(plan: Plan, text: str | None) -> ModelConfig | None:
    """With the field, if something is written quantised; without it else."""
    try:
        formats = written_formats(plan)
    except MapError:  # a map that cannot read what it writes: nothing is known of the formats
        return None if text is None else ModelConfig(text)
    used = _quantised(plan, set(formats.values()))
    if not used:
        if text is None:
            return None
        changed, removed = without_members(text, FIELD)
        return ModelConfig(changed, tuple(removed))
    if text is None:
        return ModelConfig("", lacks=f"there is no config.json, so nothing says that tensors are quantised: {_ADVICE}")
    if without_members(text, FIELD)[1]:
        return ModelConfig(text)
    value = _determined(plan, formats, used)
    if value is None:
        words = ", ".join(sorted(used))
        return ModelConfig(text, lacks=f"it has no {FIELD}, which the formats {words} do not determine: {_ADVICE}")
    return ModelConfig(with_member(text, FIELD, value), added=FIELD)


_ADVICE = "give the config.json of such a checkpoint with --config"


def _quantised(plan: Plan, names: set[str]) -> dict[str, ir.CodecSpec | None]:
    """Those of some formats, by name, that quantise; a value change or a cast does not."""
    declared = declared_formats(plan.request.map.checked.map)
    found = {name: declared.get(name) for name in names}
    return {name: codec for name, codec in found.items() if codec is None or _is_quantising(codec)}


def _is_quantising(codec: ir.CodecSpec) -> bool:
    return codec.kind in ir.QUANTISED and getattr(parse_codec(codec), "element", "") != "same"


def _writes_quantised(plan: Plan) -> bool:
    """Whether the right side has formats of its own that quantise."""
    tensors = [tensor for rule in plan.request.map.checked.map.rules for tensor in rule.right]
    return any(_is_quantising(codec) for tensor in tensors for codec in tensor.codecs)


def looks_quantised(dtype: str, shape: Any) -> bool:
    """Whether a stored tensor has codes in it, by its header: one that is a vector is taken for something else."""
    narrow = dtype.startswith(("F8", "F6", "F4")) or dtype in _PACKED
    return narrow and len(shape) > 1


def _determined(
    plan: Plan, formats: Mapping[str, str], used: Mapping[str, ir.CodecSpec | None]
) -> dict[str, Any] | None:
    """The field as transformers reads it, where the formats say all of it."""
    storages = {name: None if codec is None else parse_codec(codec) for name, codec in used.items()}
    blocks = {name: storage for name, storage in storages.items() if isinstance(storage, BlockStorage)}
    if len(blocks) < len(storages):
        return None
    if all(map(_is_mxfp4, blocks.values())):
        return {"quant_method": "mxfp4"}
    return _fp8(plan, formats, blocks)


def _is_mxfp4(storage: BlockStorage) -> bool:
    named = storage.part_names("m.weight") == {"payload": "m.weight_blocks", "scale": "m.weight_scales"}
    return storage.element == "f4e2m1" and storage.block == (1, 32) and storage.blocks and named


def _fp8(plan: Plan, formats: Mapping[str, str], blocks: Mapping[str, BlockStorage]) -> dict[str, Any] | None:
    """That of FP8 in square blocks, DeepSeek's, with experts in FP4 if they are."""
    dense = {name: storage for name, storage in blocks.items() if storage.element == "f8e4m3"}
    narrow = {name: storage for name, storage in blocks.items() if name not in dense}
    sizes = {storage.block for storage in dense.values()}
    scales = {_FP8_SCALES.get((storage.scale_dtypes or ("f32",))[0]) for storage in blocks.values()}
    known = [storage.part_names("m.weight").get("scale") in _FP8_NAMES for storage in blocks.values()]
    is_plain = all(_is_plain(storage) for storage in blocks.values())
    if len(sizes) != 1 or len(scales) != 1 or None in scales or not all(known) or not is_plain:
        return None
    block = sizes.pop()
    if None in block or not all(_is_fp4(storage) for storage in narrow.values()):
        return None
    if any((formats[name] in narrow) != (".experts." in name) for name in formats) and narrow:
        return None
    value: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    if (scale := scales.pop()) != "float":
        value["scale_fmt"] = scale
    if narrow:
        value["expert_dtype"] = "fp4"
    plain = list(_plain_modules(plan, formats))
    if any(".experts." in name for name in plain):  # which transformers makes FP8 or not all at once
        return None
    return value | ({"modules_to_not_convert": plain} if plain else {})


def _is_plain(storage: BlockStorage) -> bool:
    """One scale a block, and nothing else beside the payload, which has the tensor's own name."""
    return set(storage.templates) == {"payload", "scale"} and storage.payload == "{key}" and not storage.inverse


def _is_fp4(storage: BlockStorage) -> bool:
    return storage.element == "f4e2m1" and storage.block == (1, 32) and not storage.blocks


def _plain_modules(plan: Plan, formats: Mapping[str, str]) -> Iterator[str]:
    """Modules with a weight matrix that is stored as it is."""
    for name, _, shape in outputs_of(plan, {}):
        module, _, last = name.rpartition(".")
        if last == "weight" and len(shape) == 2 and name not in formats and module:
            yield module
