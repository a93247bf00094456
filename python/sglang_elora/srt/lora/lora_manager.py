"""The LoRA manager: loads and unloads adapters, and prepares the LoRA part of forward batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.utils import (
    capturing_lora_graph,
    generate_sequence_lengths,
    get_lm_head_pruned_lens,
)
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.utils import replace_submodule
from typing_extensions import override

from sglang_elora.adapters import (
    INVOCATION,
    NUM_DROPPED,
    content_digest,
    is_tower,
    one_rank_tensors,
    read_adapter,
    served_modules,
    why_not_stacked,
)
from sglang_elora.control import StateMirror
from sglang_elora.pages import EMBEDDING, OUTPUT_LAYER, AdapterImage, AdapterLayout, PagedAdapter
from sglang_elora.srt.lora.adapter_weights import stored_config
from sglang_elora.srt.lora.experts import ExpertsWithLoRA, why_not_served
from sglang_elora.srt.lora.input_projection import NAME as INPUT_PROJECTION
from sglang_elora.srt.lora.input_projection import InputProjectionWithLoRA
from sglang_elora.srt.lora.lora_backend import (
    EXPERT_TARGETS,
    MAX_RANK,
    Graph,
    PagedLoRABackend,
    segments_of,
)
from sglang_elora.srt.lora.lora_pool import PagedLoRAPool
from sglang_elora.srt.measured_costs import MeasuredCosts
from sglang_elora.srt.mem_cache.kv_pool import num_pool_layers
from sglang_elora.srt.mem_cache.ranks import are_equal, digest_values
from sglang_elora.srt.mem_cache.residency import AdapterChanged, AdapterSource, Residency
from sglang_elora.swapper.adapter_copy import AdapterCopy

if TYPE_CHECKING:
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.managers.io_struct import LoRAUpdateOutput
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

_CHANGED = "its file has changed since it was loaded: unload it and load it again"


class EloraLoRAManager(LoRAManager):
    """SGLang's LoRA manager with adapters in the KV pool.

    SGLang builds it before the KV pool; ``bind`` connects it to the pool.
    """

    memory_pool: PagedLoRAPool
    lora_backend: PagedLoRABackend

    def __init__(self, *args: Any, max_loras_per_batch: int, **kwargs: Any) -> None:
        self.residency: Residency | None = None
        self._measure: MeasuredCosts | None = None
        self.max_adapters_in_batch = 0
        self.num_checks = 0  # checks by --elora-check, which also updates ``mirror``
        self.mirror = StateMirror()
        # Batches and pins are limited by memory, not by a number of slots.
        super().__init__(*args, max_loras_per_batch=sys.maxsize, **kwargs)
        self.memory_pool.set_model(
            self.embed_tokens_module,
            self.lm_head_module,
            pool_layers=num_pool_layers(kwargs["server_args"], self.memory_pool.num_layer),
        )
        self.update_lora_info()
        max_rank = kwargs.get("max_lora_rank") or max(self.max_lora_rank, MAX_RANK)
        shapes, tp_size = self.memory_pool.plan.shapes, self.memory_pool.tp_size
        self.lora_backend.set_model(shapes, self.dtype, max_rank=max_rank, tp_size=tp_size)
        self.lora_backend.vocabulary = self.memory_pool.vocabulary
        self.memory_pool.max_rank = self.lora_backend.max_rank

    @override
    def init_lora_shapes(
        self, max_lora_rank: int | None = None, target_modules: Iterable[str] | None = None
    ) -> None:
        """Find the target modules.

        Raises:
            ValueError: A module is named that is not served with this model.
        """
        super().init_lora_shapes(max_lora_rank, target_modules)
        named, served = set(target_modules or ()) != {"all"}, self.target_modules
        if "gate_up_proj" in served and self._modules_named("up_proj"):
            served = served | {"up_proj"}  # without a gate; SGLang takes it for a part of the other
        # "all" includes these; adapters with weights for them are refused.
        for module, reason_of in (
            (EMBEDDING, self._why_embedding_is_plain),
            (OUTPUT_LAYER, self._why_output_layer_is_plain),
            ("kv_b_proj", lambda: "its attention does not call it"),
            (INPUT_PROJECTION, self._why_input_projection_is_plain),
        ):
            if module in served and (reason := reason_of()):
                if named:
                    raise ValueError(f"LoRA on {module} is not served with this model: {reason}")
                served = served - {module}
        if served >= EXPERT_TARGETS and (reason := self._why_experts_are_plain()):
            if named:
                raise ValueError(
                    f"LoRA on the experts of this model is not served: {reason}; name modules of "
                    "attention only in --lora-target-modules"
                )
            served = served - EXPERT_TARGETS
        self.target_modules: set[str] = served

    def _why_experts_are_plain(self) -> str | None:
        """Why LoRA on some layer's experts is not served; None also for a model without experts."""
        layers = [module for module in self.base_model.modules() if isinstance(module, FusedMoE)]
        return next(filter(None, map(why_not_served, layers)), None)

    def _why_embedding_is_plain(self) -> str | None:
        """Why SGLang's LoRA layer cannot take the place of the embedding."""
        found = self._modules_named(EMBEDDING)
        if len(set(found)) != 1 or not isinstance(found[0], VocabParallelEmbedding):
            return "SGLang's LoRA does not know the class of its embedding"
        if not self._modules_named(OUTPUT_LAYER):
            return "its embedding computes the logits, too"
        return None

    def _why_output_layer_is_plain(self) -> str | None:
        """Why SGLang's LoRA layer would compute other logits than the plain output layer."""
        config = self.base_hf_config
        if get_exec().features.enable_fp32_lm_head or any(
            getattr(config, f"enable_lm_head_{which}", False) for which in ("fp32", "output_fp32")
        ):
            return "its logits are computed in float32 (--enable-fp32-lm-head)"
        found = self._modules_named(OUTPUT_LAYER)
        if not all(isinstance(module, VocabParallelEmbedding) for module in found):
            return "SGLang's LoRA does not know the class of its output layer"
        if not all(isinstance(m.quant_method, UnquantizedEmbeddingMethod) for m in found):
            return "its output layer is quantized"
        return None

    def _why_input_projection_is_plain(self) -> str | None:
        """Why an adapter's B cannot be split over tensor-parallel ranks as the projection is."""
        found = self._modules_named(INPUT_PROJECTION)
        if get_parallel().tp_size > 1 and not all(
            isinstance(module, MergedColumnParallelLinear) for module in found
        ):
            return "tensor-parallel ranks share its groups"
        return None

    def _modules_named(self, name: str) -> list[Any]:
        """The model's modules of this name, a shared one under each of its names."""
        return [
            module
            for path, module in self.base_model.named_modules(remove_duplicate=False)
            if path.rsplit(".", 1)[-1] == name and not is_tower(path)
        ]

    @override
    def init_memory_pool(self) -> None:
        self.memory_pool = PagedLoRAPool(
            base_hf_config=self.base_hf_config,
            max_loras_per_batch=1,  # slots of SGLang's LoRA buffers, which are not allocated
            dtype=self.dtype,
            max_lora_rank=max(self.max_lora_rank, 1),
            target_modules=self.target_modules,
            base_model=self.base_model,
            eviction_policy=self.eviction_policy,
            lora_added_tokens_size=self.lora_added_tokens_size,
            strict_loading=self.lora_strict_loading,
            modules=self.lora_modules,
        )
        self.memory_pool.on_removed = self._retire

    @override
    def set_lora_module(
        self, module_name: str, module: torch.nn.Module, **options: Any
    ) -> torch.nn.Module:
        """Put a layer with LoRA in the place of the model's."""
        layer: torch.nn.Module
        leaf = module_name.rsplit(".", 1)[-1]
        if isinstance(module, FusedMoE):
            layer = ExpertsWithLoRA(module, self.lora_backend, **options)
        elif leaf == INPUT_PROJECTION and isinstance(module, MergedColumnParallelLinear):
            layer = InputProjectionWithLoRA(module, self.lora_backend)
        else:
            layer = super().set_lora_module(module_name, module, **options)
            return layer
        replace_submodule(self.base_model, module_name, layer)
        return layer

    def bind(self, residency: Residency, measure: MeasuredCosts) -> None:
        """Connect the manager to the KV pool and register the adapters given at start.

        Raises:
            PoolTooSmall: An adapter given at start does not fit.
            ValueError: Tensor-parallel ranks have read different adapters.
        """
        planned, found = self.memory_pool.plan.num_layers, residency.planes.num_layers
        assert planned == found, (
            f"the KV pool has {found} layers, adapters were laid out for {planned}"
        )
        self.residency, self._measure = residency, measure
        residency.replays_prefill_graph = self._replays_prefill_graph
        self.lora_backend.warm_up(residency.planes)
        for lora_ref in self.lora_refs.values():
            self._take_in(self._source_of(lora_ref))
        facts = repr([self._facts(adapter_id) for adapter_id in self.lora_refs])
        if not are_equal(residency.ranks.least(digest_values(facts))):
            raise ValueError(
                "adapters of --lora-paths were replaced while the tensor-parallel ranks read them: "
                "start the server again"
            )

    @override
    def load_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        """Load an adapter on all tensor-parallel ranks or on none, and start to read its
        weights."""
        result = self.agree_on_load(lora_ref, super().load_lora_adapter(lora_ref))
        if result.success and self.residency is not None:
            self.residency.host.request(lora_ref.lora_id)
        return result

    def agree_on_load(self, lora_ref: LoRARef, result: LoRAUpdateOutput) -> LoRAUpdateOutput:
        """The common result of all ranks. Unless all loaded the same adapter, it is unloaded.

        Each rank has to call it once per load, also if its own has failed.
        """
        if self.residency is None:
            return result
        facts = self._facts(lora_ref.lora_id) if result.success else None
        ranks = self.residency.ranks
        everywhere, *digests = ranks.least([int(result.success), *digest_values(facts)])
        if not result.success or (everywhere and are_equal(digests)):
            return result
        self.unload_lora_adapter(lora_ref)
        reason = "its files were replaced meanwhile" if everywhere else "another rank failed"
        return self.create_lora_update_result(
            success=False,
            error_message=f"Failed to load {lora_ref.lora_name} on all tensor-parallel ranks: "
            f"{reason}",
        )

    def _facts(self, adapter_id: str) -> str:
        """The properties of an adapter that must be equal on all ranks."""
        assert self.residency is not None
        num_slots = self.residency.adapter_table.get(adapter_id).num_slots
        return repr((num_slots, sorted(self.configs[adapter_id].hf_config.items())))

    @override
    def load_lora_weights(self, lora_ref: LoRARef) -> None:
        """Register an adapter from its configuration and the headers of its file.

        Its weights are read when a request needs it, or, if it is loaded while the server runs, as
        soon as all ranks have registered it.
        """
        if self.residency is not None:  # otherwise ``bind`` registers it
            with self._forgetting_on_error(lora_ref):
                self._take_in(self._source_of(lora_ref))

    @override
    def load_lora_weights_from_tensors(
        self, lora_ref: LoRARef, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        with self._forgetting_on_error(lora_ref):
            super().load_lora_weights_from_tensors(lora_ref, tensors)
            adapter = self.loras.pop(lora_ref.lora_id)  # the image replaces SGLang's copy
            layout = self._layout_of(adapter.config.r, self.memory_pool.modules_of(adapter))
            image = self.memory_pool.image_of(adapter, layout)
            source = AdapterSource(
                lora_ref.lora_id,
                lora_ref.lora_name,
                image.layout,
                image.nbytes,
                pinned=bool(lora_ref.pinned),
                num_dropped=self._num_dropped(lora_ref.lora_id),
                invocation=self._invocation(lora_ref.lora_id),
                image=image,
            )
            self._take_in(source)

    @override
    def validate_lora_batch(self, lora_ids: set[str | None]) -> bool:
        """Always True: admission has ensured that each adapter has slots."""
        return True

    @override
    def fetch_new_loras(
        self, new_loras: set[str | None], running_loras: set[str | None] | None = None
    ) -> None:
        """Do nothing: ``prepare_lora_batch``, which always follows, sets up the weights."""

    @override
    def prepare_lora_batch(self, forward_batch: ForwardBatch) -> None:
        """Set the backend's batch: which adapter applies to which rows of the next forward pass.

        SGLang captures its CUDA graphs before it builds the KV cache, with batches without
        adapters. Only batches with adapters need the residency, which is created with that cache.
        """
        ids = forward_batch.lora_ids
        distinct = sorted(set(ids) - {None})
        graph = self._graph_of(forward_batch)
        if not distinct and self._runs_without_kernels(graph):
            self.lora_backend.reset_batch_state()
            return
        adapters, awaited = self._adapters_of(distinct)
        if awaited and self._measure is not None:
            self._measure.batch_waited = True
        self.lora_backend.await_copies(awaited, graph)
        self._set_output_rows(forward_batch, [adapters.get(adapter_id) for adapter_id in ids])
        self.max_adapters_in_batch = max(self.max_adapters_in_batch, len(distinct))
        rows = generate_sequence_lengths(forward_batch, device=torch.device("cpu")).tolist()
        first = repeat(sys.maxsize)  # every row of a decode step comes after the prompt
        if forward_batch.forward_mode.is_extend():
            first = forward_batch.extend_prefix_lens_cpu or first
        runs = zip(ids, rows, first, strict=False)
        self.lora_backend.set_batch(segments_of(runs, adapters), graph)

    def _set_output_rows(
        self, forward_batch: ForwardBatch, adapters: Sequence[PagedAdapter | None]
    ) -> None:
        """Set the rows that reach the output layer, if they are not all rows of the batch."""
        if OUTPUT_LAYER not in self.lora_backend.vocabulary:
            return
        lengths = get_lm_head_pruned_lens(forward_batch)
        if lengths is None:
            self.lora_backend.set_output_rows(None)
        else:
            self.lora_backend.set_output_rows(list(zip(adapters, lengths, strict=False)))

    def _adapters_of(
        self, adapter_ids: Sequence[str]
    ) -> tuple[dict[str, PagedAdapter], list[AdapterCopy]]:
        """These adapters with their slots, and their copies that are in progress."""
        if not adapter_ids:
            return {}, []
        assert self.residency is not None, "a batch with adapters before the KV cache is built"
        copies = self.residency.copies
        return (
            {adapter_id: self.residency.paged(adapter_id) for adapter_id in adapter_ids},
            [copies[adapter_id] for adapter_id in adapter_ids if adapter_id in copies],
        )

    def _graph_of(self, forward_batch: ForwardBatch) -> Graph | None:
        """The kind of CUDA graphs that may replay the batch, by SGLang's own rules; None: none."""
        if self._use_cuda_graph_batch(forward_batch):
            return Graph.DECODE
        return Graph.PREFILL if self.can_use_prefill_cuda_graph(forward_batch) else None

    def _runs_without_kernels(self, graph: Graph | None) -> bool:
        """Whether a batch without adapters launches no LoRA kernels.

        SGLang captures decode with and without LoRA kernels, and replays the latter for such a
        batch. It captures prefill only with them, so such a batch must fill the static tables.
        """
        if graph is Graph.DECODE:
            return self.lora_backend.skip_inactive_dense_lora and not capturing_lora_graph()
        return graph is None

    def _replays_prefill_graph(self, num_requests: int, num_tokens: int) -> bool:
        """Whether SGLang's rule for prefill graphs accepts a batch of this size."""
        batch: Any = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND, batch_size=num_requests, extend_num_tokens=num_tokens
        )
        return bool(self.can_use_prefill_cuda_graph(batch))

    def _source_of(self, lora_ref: LoRARef) -> AdapterSource:
        """Description of an adapter from the headers of its file."""
        adapter_id, name = lora_ref.lora_id, lora_ref.lora_name
        layout = self._layout_of(
            self.configs[adapter_id].r, served_modules(name, lora_ref.lora_path)
        )
        num_layers = self.memory_pool.plan.num_layers
        num_bytes = num_layers * sum(layout.plane_elems) * self.dtype.itemsize
        read = partial(self._read_image, lora_ref, self.configs[adapter_id], layout)
        return AdapterSource(
            adapter_id,
            name,
            layout,
            num_bytes,
            pinned=bool(lora_ref.pinned),
            num_dropped=self._num_dropped(adapter_id),
            invocation=self._invocation(adapter_id),
            read=read,
        )

    def _layout_of(self, rank: int, present: AbstractSet[tuple[int | None, str]]) -> AdapterLayout:
        """Layout of an adapter's weights.

        Args:
            present: As of ``LayerPlan.shapes_of``, as what is raised.
        """
        plan = self.memory_pool.plan
        named = {
            (layer, "up_proj" if plan.has_no_gate(layer) and module == "gate_up_proj" else module)
            for layer, module in present
        }
        shapes = plan.shapes_of(named)
        return AdapterLayout.build(rank, shapes, self._num_planes)

    @property
    def _num_planes(self) -> int:
        assert self.residency is not None
        return self.residency.planes.num_planes

    def _num_dropped(self, adapter_id: str) -> int:
        number: int = self.configs[adapter_id].hf_config.get(NUM_DROPPED, 0)
        return number

    def _invocation(self, adapter_id: str) -> tuple[int, ...]:
        return tuple(self.configs[adapter_id].hf_config.get(INVOCATION) or ())

    def _read_image(
        self,
        lora_ref: LoRARef,
        config: LoRAConfig,
        layout: AdapterLayout,
        chunks: Sequence[torch.Tensor],
    ) -> AdapterImage:
        """Read the adapter's file and write its weights to ``chunks``. Runs in a reader thread.

        Raises:
            AdapterError: It cannot be read, or a weight is NaN or too large.
            AdapterChanged: Its shapes differ from those in its headers when it was loaded.
            RuntimeError, MemoryError: There is too little memory, or torch failed otherwise.
        """
        tensors = read_adapter(lora_ref.lora_name, lora_ref.lora_path)
        version = content_digest(tensors)  # of the whole file, so equal on all ranks
        try:
            tensors = one_rank_tensors(lora_ref.lora_name, stored_config(config), tensors)
        except (LookupError, ValueError) as error:
            raise AdapterChanged(f"{_CHANGED} ({error})") from error
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
        try:  # shapes were checked when it was loaded, so a failure means that the file changed
            adapter.initialize_weights_from_tensors(tensors)
            present = self.memory_pool.modules_of(adapter)
            if self._layout_of(config.r, present) != layout:
                raise AdapterChanged(_CHANGED)
            return self.memory_pool.image_of(adapter, layout, chunks, version)
        except (AssertionError, ValueError, LookupError) as error:
            if isinstance(error, AdapterChanged):
                raise
            raise AdapterChanged(f"{_CHANGED} ({error})") from error

    @contextmanager
    def _forgetting_on_error(self, lora_ref: LoRARef) -> Iterator[None]:
        """Remove the adapter from the manager's tables if loading fails in this block."""
        try:
            yield
        except Exception:
            self.configs.pop(lora_ref.lora_id, None)
            self.loras.pop(lora_ref.lora_id, None)
            raise

    def _take_in(self, source: AdapterSource) -> None:
        assert self.residency is not None
        self.residency.register(source)
        # Shown by SGLang's metrics as slots: the number of adapters that can run at once.
        self.memory_pool.max_loras_per_batch = len(self.residency.adapter_table)

    def _retire(self, adapter_id: str) -> None:
        if self.residency is not None:
            self.residency.retire(adapter_id)
