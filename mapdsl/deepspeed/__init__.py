"""Loading Megatron shards the way DeepSpeed's `SDLoaderFactory` does, on top of a map.

The names, arguments and results are DeepSpeed's; merging and splitting are those of the map `megatron/loader`.
"""

from __future__ import annotations

from mapdsl.deepspeed.factory import SDLoaderFactory
from mapdsl.deepspeed.loader import MegatronSDLoader

__all__ = ["MegatronSDLoader", "SDLoaderFactory"]
