"""torch Distributed Checkpoint over a map: a model's own state out of stored tensors, and into them.

load(model_state, storage_reader=MapStorageReader("DeepSeek-V4", "deepseek_v4"))
save(model_state, storage_writer=MapStorageWriter("out", "deepseek_v4", config))
"""

from __future__ import annotations

from mapdsl.frameworks.dcp_reading import MapStorageReader
from mapdsl.frameworks.dcp_writing import MapStorageWriter

__all__ = ["MapStorageReader", "MapStorageWriter"]
