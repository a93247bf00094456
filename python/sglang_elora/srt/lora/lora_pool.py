"""A LoRA memory pool that allocates no weights: shapes for SGLang's layers, and adapter images.

SGLang's pool is a buffer of ``--max-loras-per-batch`` slots, each sized for the largest rank. This
one holds references; the weights lie in the KV pool (``residency.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
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
    columns]``."""

    max_lora_rank: int

    _entry: Callable[[int, str, tuple[int, ...]], Any]  # (layer, module, shape)

    @override
    def init_buffers(self, base_model: torch.nn.Module) -> None:
        self.base_model = base_model
        self._num_experts_local = self._get_num_local_experts(base_model)  # SGLang's loader reads
        for buffers, shape_of in (
            (self.A_buffer, self.get_lora_A_shape),
            (self.B_buffer, self.get_lora_B_shape),
        ):
            for module in (self.target_modules - OUTSIDE_LAYERS) | self._expert_modules():
                shapes = [
                    shape_of(module, base_model, self.max_lora_rank, layer)
                    for layer in range(self.num_layer)
                ]
                buffers[module] = [
                    self._entry(layer, module, shape) for layer, shape in enumerate(shapes)
                ]
        for module in self.target_modules & OUTSIDE_LAYERS:
            for buffer, shape_of in zip(
                self.outside_buffers(module),
                (self.get_embedding_lora_A_shape, self.get_embedding_lora_B_shape),
                strict=True,
            ):
                shape = shape_of(module, base_model, self.max_lora_rank, 0)
                buffer[module] = self._entry(0, module, shape)

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
    output_module: ParallelLMHeadWithLoRA | None = None  # set by the manager, as the next
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

    def module_shapes(self, modules: Layers) -> tuple[ModuleShape, ...]:
        """Shape of each target module on this tensor-parallel rank; several of a module whose
        shape differs between layers. Those that all layers have come first.

        Raises:
            ValueError: A module has more shapes than are served.
        """
        found: dict[str, dict[ModuleShape, list[int]]] = {}
        for layer, by_name in enumerate(modules):
            for full_name, module in by_name.items():
                for shape in self._shapes_of(layer, full_name, module):
                    found.setdefault(shape.name, {}).setdefault(shape, []).append(layer)
        shapes = [module.shape for module in self.vocabulary.values()]
        for name, by_shape in found.items():
            if len(by_shape) > (1 if name in EXPERT_MODULES else _MAX_SHAPES):
                raise ValueError(
                    f"--elora needs layers of few shapes, but {name} has {len(by_shape)}: leave it "
                    "out of --lora-target-modules, or run without --elora"
                )
            for i, (shape, layers) in enumerate(by_shape.items()):
                key = name if len(by_shape) == 1 else f"{name}@{i}"
                own = frozenset(layers) if len(layers) < self.num_layer else None
                shapes.append(replace(shape, name=key, layers=own))
        return tuple(sorted(shapes, key=lambda shape: (shape.layers is not None, shape.name)))

    def name_by_shape(self, shapes: Sequence[ModuleShape]) -> None:
        """Let the references of modules with several shapes name the shape of their layer."""
        for shape in shapes:
            if shape.name != shape.module:
                for buffer in (self.A_buffer[shape.module], self.B_buffer[shape.module]):
                    for layer in shape.layers or ():
                        buffer[layer] = replace(buffer[layer], module=shape.name)

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

    def take_vocabulary(
        self, embedding: torch.nn.Module | None, output: ParallelLMHeadWithLoRA | None
    ) -> None:
        """Set the embedding and the output layer, those of them that the model has and that
        adapters may have weights for."""
        self.output_module = output
        vocabulary = {}
        for name, module in ((EMBEDDING, embedding), (OUTPUT_LAYER, output)):
            if module is not None:
                a, b = (buffer[name] for buffer in self.outside_buffers(name))
                sizes = (b.shape[1], a.shape[2]) if name == EMBEDDING else (a.shape[2], b.shape[1])
                vocabulary[name] = VocabularyModule(name, *sizes, self.num_layer)
        self.vocabulary = vocabulary

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
        modules: Layers,
        layout: AdapterLayout,
        chunks: Sequence[torch.Tensor] | None = None,
        version: str | None = None,
    ) -> AdapterImage:
        """The adapter's weights for this rank, laid out for the pool, in host memory.

        Args:
            layout: Of ``layout_of``.
            chunks: Destination: uint8 tensors ``[bytes]``, in total as long as the image. None:
                new memory.
            version: As in ``AdapterImage.build``.
        """
        staging = _Staging(self, adapter.config.r, layout)
        scaling, adapter.scaling = adapter.scaling, 1.0  # SGLang multiplies the experts' B by it
        try:
            staging.load_lora_weight_to_buffer(
                adapter.uid, 0, adapter, modules, None, self.output_module
            )
        finally:
            adapter.scaling = scaling

        def matrices(layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor]:
            if module in OUTSIDE_LAYERS:
                a, b = (buffer[module][0] for buffer in staging.outside_buffers(module))
                return self.vocabulary[module].part_of(layer, a, b)
            name = module.partition("@")[0]
            a, b = staging.A_buffer[name][layer][0], staging.B_buffer[name][layer][0]
            return (a.flatten(0, 1), b.flatten(0, 1)) if module in EXPERT_MODULES else (a, b)

        return AdapterImage.build(
            layout, self.num_layer, matrices, self.dtype, adapter.scaling, chunks, version
        )


def layout_of(
    rank: int,
    present: AbstractSet[tuple[int | None, str]],
    shapes: Sequence[ModuleShape],
    *,
    num_layers: int,
    num_planes: int,
) -> AdapterLayout:
    """Layout of an adapter's weights in a KV pool of so many planes.

    Args:
        present: (layer, SGLang's name) of the modules that it has weights for; the layer is None
            outside of the layers.
        shapes: Of ``PagedLoRAPool.module_shapes``.

    Raises:
        ValueError: A layer does not have a module that the adapter has weights for.
    """
    served = {
        (layer, shape.module)
        for shape in shapes
        for layer in (None, *range(num_layers))
        if layer is None or shape.is_in(layer)
    }
    if lacking := sorted(f"{module} (layer {layer})" for layer, module in present - served):
        raise ValueError(
            f"it has weights for {', '.join(lacking[:4])}, which this server does not adapt "
            "there: name them in --lora-target-modules, if the model has them"
        )
    modules = {module for _, module in present}
    own = [shape for shape in shapes if shape.module in modules]
    return AdapterLayout.build(rank, own, num_planes)


class _Staging(_Shaped):
    """A buffer for one adapter in host memory, which SGLang's own loader fills. It has no
    embedding, output layer and experts if the adapter has no weights for them."""

    def __init__(self, pool: PagedLoRAPool, rank: int, layout: AdapterLayout) -> None:
        self._layout = layout
        target_modules = pool.target_modules - (OUTSIDE_LAYERS - layout.places.keys())
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
        )
        self.pin_memory_available = False

    def _expert_modules(self) -> set[str]:
        return super()._expert_modules() & self._layout.places.keys()

    def _entry(self, layer: int, module: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype)
