"""What makes loaders: from a list of files, or from the JSON file that describes a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mapdsl.deepspeed.files import CheckpointEngine
from mapdsl.deepspeed.loader import MegatronSDLoader
from mapdsl.deepspeed.manifest import Manifest, json_of
from mapdsl.deepspeed.shards import MAP
from mapdsl.map import Map
from mapdsl.runtime.errors import ConversionError


class SDLoaderFactory:
    """Makes loaders of checkpoints, like `deepspeed.runtime.state_dict_factory.SDLoaderFactory`.

    Besides DeepSpeed's arguments both methods take some by keyword:

    - `num_heads`: how many attention heads the model has, so that a cut through a head is an error;
    - `config`: fields of the model's config under Megatron's names, a mapping or a namespace. The `args` that a
      checkpoint holds are used where this says nothing;
    - `map`: what says how tensors are cut: a map, a `.map` file or the name of a shipped one;
    - `compare`: whether tensors that all shards hold must be equal; without it the first shard's are taken.
    """

    @staticmethod
    def get_sd_loader_json(
        json_file: str | os.PathLike[str] | dict[str, Any],
        checkpoint_engine: CheckpointEngine | None = None,
        **options: Any,
    ) -> MegatronSDLoader | dict[str, Any]:
        """The loader of a checkpoint described by a JSON file, or by what would stand in one.

        For the types `bloom` and `ds_model` that is no loader, but the description itself, checked. Raises
        ConversionError, C505, where the description is wrong, and MapError, C507, where there is no such file.
        """
        data = json_of(json_file)
        manifest = Manifest.of(data)
        if not manifest.is_megatron:
            return data
        return SDLoaderFactory.get_sd_loader(
            manifest.files, checkpoint_engine, manifest.type, manifest.version, **options
        )

    @staticmethod
    def get_sd_loader(
        ckpt_list: Sequence[str | os.PathLike[str]],
        checkpoint_engine: CheckpointEngine | None = None,
        sd_type: str = "Megatron",
        version: float | None = None,
        *,
        config: Mapping[str, Any] | Any = None,
        num_heads: int | None = None,
        map: Map | str | os.PathLike[str] = MAP,  # noqa: A002 - what it is
        compare: bool = True,
    ) -> MegatronSDLoader:
        """The loader of a list of shards, one a tensor parallel rank, in order.

        `version` is that of Megatron's checkpoints: 0, 1.0, 2.0 or 3.0; where it is None it is the one that a file
        holds, else 0. Raises ConversionError, C505, for another type or version, an empty list, and a list of another
        length than the first shard says.
        """
        if sd_type != "Megatron":
            raise ConversionError("C505", f"there is no loader of checkpoints of type {sd_type!r}{_advice(sd_type)}")
        return MegatronSDLoader(
            ckpt_list, version, checkpoint_engine, config=config, num_heads=num_heads, map=map, compare=compare
        )


def _advice(sd_type: object) -> str:
    name = str(sd_type).lower()
    if name in ("bloom", "ds_model"):
        return ": `get_sd_loader_json` gives its description, which is read otherwise"
    return "; expected 'Megatron'"
