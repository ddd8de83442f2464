"""The JSON file that describes a checkpoint for DeepSpeed's inference: `{"type": "Megatron", "checkpoints": [...]}`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mapdsl.checkpoint.files import bad_file
from mapdsl.runtime.errors import ConversionError

_TYPES = ("Megatron", "bloom", "ds_model")


def json_of(source: str | os.PathLike[str] | dict[str, Any]) -> dict[str, Any]:
    """The description in a file, or the one that is given; MapError, C507, where a file holds none."""
    if isinstance(source, dict):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ConversionError("C505", f"expected the path of a JSON file or a dict, found a {type(source).__name__}")
    try:
        with open(source, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as problem:
        raise bad_file(os.fspath(source), f"cannot open the file: {problem.strerror}") from problem
    except ValueError as problem:
        raise bad_file(os.fspath(source), f"this is no JSON: {problem}") from problem
    if not isinstance(data, dict):
        raise bad_file(
            os.fspath(source), f"expected an object that describes a checkpoint, found {json.dumps(data)[:100]}"
        )
    return data


@dataclass(frozen=True)
class Manifest:
    """A description, checked: the files of tensor parallel ranks, for `Megatron` with the version of the layout."""

    type: str
    files: tuple[str, ...]
    version: float | None

    @property
    def is_megatron(self) -> bool:
        """Whether the files are Megatron's shards; others are not read by this loader."""
        return self.type == "Megatron"

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Manifest:
        """The description in a dict. ConversionError, C505, names the key that is wrong and what was expected."""
        found = _given(data, "type", str)
        is_megatron = found == "Megatron"
        if not is_megatron and found.lower() not in ("bloom", "ds_model"):
            hint = "; did you mean 'Megatron'?" if found.lower() == "megatron" else ""
            raise _wrong("type", f"one of {', '.join(_TYPES)}", repr(found) + hint)
        if (parallel := data.get("parallelization", "pp")) not in ("pp", "tp"):
            raise _wrong("parallelization", "'pp' or 'tp'", repr(parallel))
        base = _given(data, "base_dir", str) if data.get("base_dir") is not None else ""
        listed = _files(_given(data, "checkpoints", list, dict), is_megatron)
        _check_sizes(data, listed, is_megatron)
        version = None
        if is_megatron:
            if "version" not in data:
                raise _wrong("version", "0, 1.0 or 2.0, or null for the one that the shards hold", "nothing")
            version = data["version"]
        return cls(found, tuple(os.path.join(base, name) for name in listed), version)


def _files(found: Any, is_megatron: bool) -> list[str]:
    """All files; in two lists under `non_tp` and `tp` where they are not Megatron's."""
    if isinstance(found, dict):
        if is_megatron:
            raise _wrong("checkpoints", "a list of files, one a tensor parallel rank", "an object")
        if set(found) != {"non_tp", "tp"}:
            raise _wrong("checkpoints", "`non_tp` and `tp`, a list of files each", ", ".join(map(repr, found)))
        return _files(found["non_tp"], False) + _files(found["tp"], False)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise _wrong("checkpoints", "a list of files", json.dumps(found)[:100])
    return found


def _check_sizes(data: Mapping[str, Any], files: list[str], is_megatron: bool) -> None:
    """`mp_size` and `tp_size` both say over how many ranks tensors are cut; 0 is not said."""
    sizes = {}
    for key in ("mp_size", "tp_size"):
        value = data.get(key) or 0
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _wrong(key, "a number of ranks", repr(value))
        if value:
            sizes[key] = value
    if len(set(sizes.values())) > 1:
        raise _wrong("tp_size", f"{sizes['mp_size']}, as `mp_size` says", sizes["tp_size"])
    for key, value in sizes.items():
        if is_megatron and value != len(files):
            raise _wrong(key, f"{len(files)}, the number of files", value)


_WORDS: dict[type[Any], str] = {str: "a text", list: "a list", dict: "an object"}


def _given(data: Mapping[str, Any], key: str, *kinds: type[Any]) -> Any:
    value = data.get(key)
    if not isinstance(value, kinds):
        words = " or ".join(_WORDS[kind] for kind in kinds)
        raise _wrong(key, words, "nothing" if value is None else repr(value)[:100])
    return value


def _wrong(key: str, expected: str, found: object) -> ConversionError:
    message = f"the description of a checkpoint has a wrong `{key}`: expected {expected}, found {found}"
    return ConversionError("C505", message)
