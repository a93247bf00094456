"""Adapter weights in the pages of the KV pool. Uses torch; does not import SGLang."""

from __future__ import annotations

__all__ = [
    "EMBEDDING",
    "OUTPUT_LAYER",
    "OUTSIDE_LAYERS",
    "TILE",
    "AdapterImage",
    "AdapterLayout",
    "HostArena",
    "HostBlocks",
    "HostMemoryFull",
    "KVPlanes",
    "LayerPlan",
    "ModuleOffsets",
    "ModuleShape",
    "PagedAdapter",
    "SlotTable",
    "StridedRows",
    "VocabularyModule",
    "WeightRef",
    "block_bytes_for",
    "lazy_memory",
    "memory_outside",
    "stacked_modules",
]

from sglang_elora.pages.host_arena import (
    HostArena,
    HostBlocks,
    HostMemoryFull,
    block_bytes_for,
    lazy_memory,
    memory_outside,
)
from sglang_elora.pages.image import AdapterImage
from sglang_elora.pages.layer_plan import LayerPlan
from sglang_elora.pages.layout import (
    TILE,
    AdapterLayout,
    ModuleOffsets,
    ModuleShape,
    stacked_modules,
)
from sglang_elora.pages.paged_adapter import PagedAdapter
from sglang_elora.pages.planes import KVPlanes, SlotTable, StridedRows
from sglang_elora.pages.vocabulary import (
    EMBEDDING,
    OUTPUT_LAYER,
    OUTSIDE_LAYERS,
    VocabularyModule,
)
from sglang_elora.pages.weight_ref import WeightRef
