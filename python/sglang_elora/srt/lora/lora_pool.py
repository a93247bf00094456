"""A LoRA memory pool that allocates no weights: shapes for SGLang's layers, and adapter images.

SGLang's pool is a buffer of ``--max-loras-per-batch`` slots, each sized for the largest rank. This
one holds references; the weights lie in the KV pool (``residency.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.lora import mem_pool
from sglang.srt.lora.layers import FusedMoEWithLoRA
from sglang.srt.lora.mem_pool import LoRAMemoryPool
from sglang.srt.lora.utils import get_target_module_name
from typing_extensions import override

from sglang_elora.pages import (
    EMBEDDING,
    OUTPUT_LAYER,
    OUTSIDE_LAYERS,
    AdapterImage,
    AdapterLayout,
    LayerPlan,
    ModuleShape,
    VocabularyModule,
    WeightRef,
)
from sglang_elora.srt.lora.lora_backend import EXPERT_MODULES, EXPERT_TARGETS

if TYPE_CHECKING:
    from sglang.srt.lora.layers import ParallelLMHeadWithLoRA
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

_MAX_SHAPES = 4
"""Shapes of one module over the layers. Kernels are compiled for each."""

Layers = Sequence[dict[str, torch.nn.Module]]
"""Per layer: SGLang's LoRA modules by full name."""


class _Shaped(LoRAMemoryPool):
    """A pool whose buffers are created by ``_entry`` from each matrix's shape ``[adapters, rows,
    columns]``.

    Args:
        modules: The model's, with LoRA, whose shapes count. SGLang has a rule for each class of
            models, and none for some.
    """

    max_lora_rank: int

    _entry: Callable[[int, str, tuple[int, ...]], Any]  # (layer, module, shape)

    def __init__(self, *args: Any, modules: Layers, **kwargs: Any) -> None:
        self.modules = modules
        super().__init__(*args, **kwargs)

    @override
    def init_buffers(self, base_model: torch.nn.Module) -> None:
        self.base_model = base_model
        self._linears: dict[tuple[int, str], Any] = {
            (layer, get_target_module_name(full_name, self.target_modules)): module.base_layer
            for layer, by_name in enumerate(self.modules)
            for full_name, module in by_name.items()
            if not isinstance(module, FusedMoEWithLoRA)
        }
        self._num_experts_local = self._get_num_local_experts(base_model)  # SGLang's loader reads
        for module in (self.target_modules - OUTSIDE_LAYERS) | self._expert_modules():
            shapes = [self._shapes(layer, module) for layer in range(self.num_layer)]
            for i, buffers in enumerate((self.A_buffer, self.B_buffer)):
                buffers[module] = [
                    self._entry(layer, module, pair[i]) for layer, pair in enumerate(shapes)
                ]
        for module in self.target_modules & OUTSIDE_LAYERS:
            for buffer, shape_of in zip(
                self.outside_buffers(module),
                (self.get_embedding_lora_A_shape, self.get_embedding_lora_B_shape),
                strict=True,
            ):
                shape = shape_of(module, base_model, self.max_lora_rank, 0)
                buffer[module] = self._entry(0, module, shape)

    def _shapes(self, layer: int, module: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B of one adapter, of rank ``max_lora_rank``."""
        rank, linear = self.max_lora_rank, self._linears.get((layer, module))
        if module in EXPERT_MODULES:
            args = (module, self.base_model, rank, layer)
            return tuple(self.get_lora_A_shape(*args)), tuple(self.get_lora_B_shape(*args))
        if linear is None:
            return (1, 0, 0), (1, 0, 0)
        num_parts: int = mem_pool.get_stacked_multiply(module, self.base_model)
        in_size = getattr(linear, "input_size_per_partition", linear.input_size)
        sizes = getattr(linear, "output_partition_sizes", [linear.output_size])
        out_size = sum(sizes if num_parts == 1 else sizes[:num_parts])
        return (1, num_parts * rank, in_size), (1, out_size, rank)

    def _expert_modules(self) -> set[str]:
        """The experts' modules that adapters may have weights for."""
        served = self.target_modules >= EXPERT_TARGETS and self._has_moe_module(self.base_model)
        return set(EXPERT_MODULES) if served else set()

    def outside_buffers(self, module: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """SGLang's tables of A and B of the embedding or the output layer."""
        if module == EMBEDDING:
            return self.embedding_A_buffer, self.embedding_B_buffer
        return self.lm_head_A_buffer, self.lm_head_B_buffer


class PagedLoRAPool(_Shaped):
    """The LoRA memory pool of ``EloraLoRAManager``, with references instead of buffers."""

    on_removed: Callable[[str], None]  # called with an unloaded adapter's id; set by the manager
    max_rank: int | None = None  # largest rank of the backend; set by the manager
    plan: LayerPlan  # set by ``set_model``, as the next
    output_module: ParallelLMHeadWithLoRA | None = None
    vocabulary: Mapping[str, VocabularyModule] = MappingProxyType({})

    def _entry(self, layer: int, module: str, shape: tuple[int, ...]) -> WeightRef:
        device = next(self.base_model.parameters()).device
        return WeightRef(layer, module, shape, device)

    @override
    def remove_lora(self, uid: str) -> None:
        """Report an unloaded adapter to the manager; there is no buffer slot to free."""
        self.on_removed(uid)

    @override
    def can_support(self, config: LoRAConfig | Iterable[LoRAConfig]) -> bool:
        """Whether adapters can be served: ranks up to the backend's limit fit. The user's limit on
        ranks is checked earlier."""
        configs = [config] if not isinstance(config, Iterable) else list(config)
        rank = max((c.r for c in configs), default=0)
        if self.max_rank is not None and rank > self.max_rank:
            return False
        own, self.max_lora_rank = self.max_lora_rank, rank
        try:
            return bool(super().can_support(configs))
        finally:
            self.max_lora_rank = own

    def set_model(
        self,
        embedding: torch.nn.Module | None,
        output: ParallelLMHeadWithLoRA | None,
        *,
        pool_layers: int,
    ) -> None:
        """Plan where weights of the target modules lie on this tensor-parallel rank.

        Args:
            embedding, output: The embedding and the output layer, those of them that the model has
                and that adapters may have weights for.
            pool_layers: Layers of the KV pool.

        Raises:
            ValueError: A module has more shapes than are served.
        """
        self.output_module = output
        self.vocabulary = self._vocabulary(embedding, output, pool_layers)
        found: dict[ModuleShape, list[int]] = {}
        for layer, by_name in enumerate(self.modules):
            for full_name, module in by_name.items():
                for shape in self._shapes_of(layer, full_name, module):
                    found.setdefault(shape, []).append(layer)
        for name, num_shapes in Counter(shape.name for shape in found).items():
            if num_shapes > (1 if name in EXPERT_MODULES else _MAX_SHAPES):
                raise ValueError(
                    f"--elora needs layers of few shapes, but {name} has {num_shapes}: leave it "
                    "out of --lora-target-modules, or run without --elora"
                )
        outside = [module.shape for module in self.vocabulary.values()]
        self.plan = LayerPlan.build(
            found, outside, model_layers=self.num_layer, pool_layers=pool_layers
        )
        for (layer, module), place in self.plan.places.items():
            for buffer in (self.A_buffer[module], self.B_buffer[module]):
                buffer[layer] = replace(buffer[layer], layer=place.layer, module=place.name)

    def _shapes_of(
        self, layer: int, full_name: str, module: torch.nn.Module
    ) -> Iterator[ModuleShape]:
        if isinstance(module, FusedMoEWithLoRA):
            for name in EXPERT_MODULES:
                _, num_experts, num_rows, in_features = self.A_buffer[name][layer].shape
                _, _, out_features, rank = self.B_buffer[name][layer].shape
                parts = num_rows // rank
                outs = (out_features // parts,) * parts
                yield ModuleShape(name, in_features, outs, num_experts)
            return
        name = get_target_module_name(full_name, self.target_modules)
        ends: Sequence[int] = module.lora_offsets
        outs = tuple(end - start for start, end in pairwise(ends))
        yield ModuleShape(name, self.A_buffer[name][layer].shape[-1], outs)

    def _vocabulary(
        self,
        embedding: torch.nn.Module | None,
        output: torch.nn.Module | None,
        pool_layers: int,
    ) -> dict[str, VocabularyModule]:
        vocabulary = {}
        for name, module in ((EMBEDDING, embedding), (OUTPUT_LAYER, output)):
            if module is not None:
                a, b = (buffer[name] for buffer in self.outside_buffers(name))
                sizes = (b.shape[1], a.shape[2]) if name == EMBEDDING else (a.shape[2], b.shape[1])
                vocabulary[name] = VocabularyModule(name, *sizes, pool_layers)
        return vocabulary

    def modules_of(self, adapter: LoRAAdapter) -> set[tuple[int | None, str]]:
        """(layer, SGLang's name) of the modules that an adapter has weights for; the layer is None
        outside of the layers."""
        present: set[tuple[int | None, str]] = {
            (
                layer,
                get_target_module_name(name, self.target_modules)
                + ("_moe" if ".experts." in name else ""),
            )
            for layer, content in enumerate(adapter.layers)
            for name in content.weights
            if any(target in name for target in self.target_modules)
        }
        return present | {
            (None, module)
            for module in self.vocabulary
            if any(module in name for name in adapter.embedding_layers)
        }

    def image_of(
        self,
        adapter: LoRAAdapter,
        layout: AdapterLayout,
        chunks: Sequence[torch.Tensor] | None = None,
        version: str | None = None,
    ) -> AdapterImage:
        """The adapter's weights for this rank, laid out for the pool, in host memory.

        Args:
            layout: Of shapes of ``plan``.
            chunks: Destination: uint8 tensors ``[bytes]``, in total as long as the image. None:
                new memory.
            version: As in ``AdapterImage.build``.
        """
        staging = _Staging(self, adapter.config.r, layout)
        scaling, adapter.scaling = adapter.scaling, 1.0  # SGLang multiplies the experts' B by it
        try:
            staging.load_lora_weight_to_buffer(
                adapter.uid, 0, adapter, self.modules, None, self.output_module
            )
        finally:
            adapter.scaling = scaling

        def matrices(layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor]:
            if module in OUTSIDE_LAYERS:
                a, b = (buffer[module][0] for buffer in staging.outside_buffers(module))
                return self.vocabulary[module].part_of(layer, a, b)
            name, own = module.partition("@")[0], self.plan.layer_of_model(layer, module)
            a, b = staging.A_buffer[name][own][0], staging.B_buffer[name][own][0]
            return (a.flatten(0, 1), b.flatten(0, 1)) if name in EXPERT_MODULES else (a, b)

        num_layers = self.plan.num_layers
        return AdapterImage.build(
            layout, num_layers, matrices, self.dtype, adapter.scaling, chunks, version
        )


class _Staging(_Shaped):
    """A buffer for one adapter in host memory, which SGLang's own loader fills. It has no
    embedding, output layer and experts if the adapter has no weights for them."""

    def __init__(self, pool: PagedLoRAPool, rank: int, layout: AdapterLayout) -> None:
        self._modules = {place.shape.module for place in layout.places.values()}
        target_modules = pool.target_modules - (OUTSIDE_LAYERS - self._modules)
        super().__init__(
            base_hf_config=pool.base_hf_config,
            max_loras_per_batch=1,
            dtype=pool.dtype,
            max_lora_rank=rank,
            target_modules=target_modules,
            base_model=pool.base_model,
            eviction_policy="lru",
            lora_added_tokens_size=0,
            strict_loading=pool.strict_loading,
            modules=pool.modules,
        )
        self.pin_memory_available = False

    def _expert_modules(self) -> set[str]:
        return super()._expert_modules() & self._modules

    def _entry(self, layer: int, module: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype)
