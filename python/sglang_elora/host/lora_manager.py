"""The LoRA manager over pages: which adapters exist, and what a forward batch runs with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.utils import EMBEDDING_NAMES, generate_sequence_lengths

from sglang_elora.adapters import read_adapter, served_modules, why_not_stacked
from sglang_elora.control import StateMirror
from sglang_elora.host.lora_backend import MAX_RANK, Graph, PagedLoRABackend
from sglang_elora.host.lora_pool import PagedLoRAPool
from sglang_elora.host.measure import Measure
from sglang_elora.host.residency import AdapterChanged, AdapterSource, Residency
from sglang_elora.pages import AdapterImage, AdapterLayout

if TYPE_CHECKING:
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

_CHANGED = "its file has changed since it was loaded: unload it and load it again"


class EloraLoRAManager(LoRAManager):
    """SGLang's manager, whose adapters live in the KV pool.

    SGLang builds it before the KV pool is there; ``bind`` hands it the pool.
    """

    memory_pool: PagedLoRAPool
    lora_backend: PagedLoRABackend

    def __init__(self, *args: Any, max_loras_per_batch: int, **kwargs: Any) -> None:
        self.residency: Residency | None = None
        self._measure: Measure | None = None
        self.max_adapters_in_batch = 0
        self.num_checks = 0  # counted by --elora-check, which also keeps
        self.mirror = StateMirror()
        # A batch holds what fits into memory, and pinning is bounded by memory: no limit on slots.
        super().__init__(*args, max_loras_per_batch=sys.maxsize, **kwargs)
        self._shapes = self.memory_pool.module_shapes(self.lora_modules)
        max_rank = kwargs.get("max_lora_rank") or max(self.max_lora_rank, MAX_RANK)
        self.lora_backend.set_model(
            self._shapes, self.dtype, max_rank=max_rank, tp_size=self.tp_size
        )
        self.memory_pool.max_rank = self.lora_backend.max_rank

    def init_lora_shapes(self, *args: Any, **kwargs: Any) -> None:
        super().init_lora_shapes(*args, **kwargs)
        # "all" names them too; adapters that have them were refused.
        self.target_modules: set[str] = self.target_modules - set(EMBEDDING_NAMES)

    def init_memory_pool(self) -> None:
        self.memory_pool = PagedLoRAPool(
            base_hf_config=self.base_hf_config,
            max_loras_per_batch=1,  # a slab's slots; there are none
            dtype=self.dtype,
            tp_size=self.tp_size,
            tp_rank=self.tp_rank,
            attn_tp_size=self.attn_tp_size,
            max_lora_rank=max(self.max_lora_rank, 1),
            target_modules=self.target_modules,
            base_model=self.base_model,
            eviction_policy=self.eviction_policy,
            lora_added_tokens_size=self.lora_added_tokens_size,
            strict_loading=self.lora_strict_loading,
        )
        self.memory_pool.on_removed = self._retire

    def bind(self, residency: Residency, measure: Measure) -> None:
        """Adapters live in this pool from now on.

        Raises:
            PoolTooSmall: An adapter given at start does not fit.
            ValueError: The model's layers differ in shape.
        """
        self.residency, self._measure = residency, measure
        self.lora_backend.warm_up(residency.planes)
        for lora_ref in self.lora_refs.values():
            self._take_in(self._source_of(lora_ref))

    def load_lora_weights(self, lora_ref: LoRARef) -> None:
        """Make an adapter known by its configuration and the headers of its file.

        Its weights are read when a request names it; those of one that is loaded while the server
        runs, at once and beside it.
        """
        if self.residency is not None:  # else ``bind`` takes it in
            self._take_in_or_forget(lora_ref, self._source_of(lora_ref))
            self.residency.host.request(lora_ref.lora_id)

    def load_lora_weights_from_tensors(
        self, lora_ref: LoRARef, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        super().load_lora_weights_from_tensors(lora_ref, tensors)
        adapter = self.loras.pop(lora_ref.lora_id)  # the image is the copy from here on
        image = self.memory_pool.image_of(adapter, self.lora_modules, self._shapes)
        source = AdapterSource(
            lora_ref.lora_id,
            lora_ref.lora_name,
            image.layout,
            image.nbytes,
            pinned=bool(lora_ref.pinned),
            image=image,
        )
        self._take_in_or_forget(lora_ref, source)

    def validate_lora_batch(self, lora_ids: set[str | None]) -> bool:
        """Always: admission has secured each adapter's slots."""
        return True

    def fetch_new_loras(
        self, new_loras: set[str | None], running_loras: set[str | None] | None = None
    ) -> None:
        """Nothing: ``prepare_lora_batch``, which always follows, brings the weights."""

    def prepare_lora_batch(self, forward_batch: ForwardBatch) -> None:
        """Weights of the batch's adapters into their slots, and who computes which rows."""
        ids = forward_batch.lora_ids
        distinct = sorted(set(ids) - {None})
        graph = self._graph_of(forward_batch)
        if not distinct and graph is None:
            self.lora_backend.reset_batch_state()
            return
        assert self.residency is not None, "a batch with adapters before the KV pool"
        adapters = {uid: self.residency.paged(uid) for uid in distinct}
        under_way = self.residency.copies
        awaited = [under_way[uid] for uid in distinct if uid in under_way]
        if awaited and self._measure is not None:
            self._measure.has_waited = True
        self.lora_backend.await_copies(awaited, graph)
        self.max_adapters_in_batch = max(self.max_adapters_in_batch, len(distinct))
        rows = generate_sequence_lengths(forward_batch, device=torch.device("cpu")).tolist()
        self.lora_backend.set_batch(
            [
                (None if uid is None else adapters[uid], num_rows)
                for uid, num_rows in zip(ids, rows, strict=False)
            ],
            graph,
        )

    def _graph_of(self, forward_batch: ForwardBatch) -> Graph | None:
        """Which CUDA graphs may replay the batch, by SGLang's own rules."""
        if self._use_cuda_graph_batch(forward_batch):
            return Graph.DECODE
        return Graph.PREFILL if self.can_use_prefill_cuda_graph(forward_batch) else None

    def _source_of(self, lora_ref: LoRARef) -> AdapterSource:
        """What the headers of the adapter's file tell."""
        uid, name = lora_ref.lora_id, lora_ref.lora_name
        present = served_modules(name, lora_ref.lora_path)
        shapes = [shape for shape in self._shapes if shape.name in present]
        layout = AdapterLayout.build(self.configs[uid].r, shapes)
        num_bytes = self.memory_pool.num_layer * sum(layout.plane_elems) * self.dtype.itemsize
        read = partial(self._read_image, lora_ref, self.configs[uid], layout)
        return AdapterSource(uid, name, layout, num_bytes, bool(lora_ref.pinned), read=read)

    def _read_image(
        self,
        lora_ref: LoRARef,
        config: LoRAConfig,
        layout: AdapterLayout,
        chunks: Sequence[torch.Tensor],
    ) -> AdapterImage:
        """The adapter's weights from its file, written to ``chunks``. Runs in a reader's thread.

        Raises:
            AdapterError: It cannot be read, or a weight is NaN or infinite.
            AdapterChanged: Its shapes are not what its headers said when it was loaded.
            RuntimeError, MemoryError: There is no memory for it, or torch failed otherwise.
        """
        tensors = read_adapter(lora_ref.lora_name, lora_ref.lora_path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if problem := why_not_stacked(shapes, config.r):
            raise AdapterChanged(f"{_CHANGED} ({problem})")
        adapter = LoRAAdapter(
            lora_ref.lora_id,
            config,
            self.base_hf_config,
            self.load_config,
            self.lora_backend,
            base_model=self.base_model,
        )
        try:  # shapes were checked when it was loaded, so what fails on them now has changed since
            adapter.initialize_weights_from_tensors(tensors)
            if self.memory_pool.layout_of(adapter, self._shapes) != layout:
                raise AdapterChanged(_CHANGED)
            return self.memory_pool.image_of(adapter, self.lora_modules, self._shapes, chunks)
        except (AssertionError, ValueError, LookupError) as error:
            if isinstance(error, AdapterChanged):
                raise
            raise AdapterChanged(f"{_CHANGED} ({error})") from error

    def _take_in_or_forget(self, lora_ref: LoRARef, source: AdapterSource) -> None:
        """Register an adapter; if that fails nothing of it stays."""
        try:
            self._take_in(source)
        except Exception:
            del self.configs[lora_ref.lora_id]
            raise

    def _take_in(self, source: AdapterSource) -> None:
        assert self.residency is not None
        self.residency.register(source)
        # What SGLang's metrics show as slots: adapters that could run at once.
        self.memory_pool.max_loras_per_batch = len(self.residency.forest)

    def _retire(self, uid: str) -> None:
        if self.residency is not None:
            self.residency.retire(uid)
