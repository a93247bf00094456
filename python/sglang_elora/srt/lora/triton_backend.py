"""LoRA backend ``elora_triton``: kernels that read adapters' weights from scattered KV pages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from typing_extensions import override

from sglang_elora.kernels import (
    MOST_SINGLE_ROUTES,
    Batch,
    BatchTables,
    ExpandConfig,
    RoutedTiles,
    ShrinkConfig,
    StackedModule,
    Tiles,
    expand_config,
    lora_expand,
    lora_logits,
    lora_lookup,
    lora_shrink,
    record_ints,
    routed_tiles,
    shrink_config,
    tuned_tile_counts,
)
from sglang_elora.pages import (
    EMBEDDING,
    OUTPUT_LAYER,
    OUTSIDE_LAYERS,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    WeightRef,
    stacked_modules,
)
from sglang_elora.pages.layout import padded
from sglang_elora.srt.lora.lora_backend import (
    TRITON,
    Graph,
    PagedLoRABackend,
    Segment,
)
from sglang_elora.srt.mem_cache.kv_pool import planes_of

logger = logging.getLogger(__name__)

DECODE_TILE_ROWS, PREFILL_TILE_ROWS = 16, 64
DETERMINISTIC_TILES = 128
"""With ``--enable-deterministic-inference`` every batch uses the launch configuration for this many
small tiles, so that the order of a row's sums does not depend on the other rows."""


@dataclass(frozen=True, slots=True)
class LaunchedBatch:
    """The batch that kernels are launched for. SGLang's layers read ``has_active_lora``.

    Args:
        tables: The batch on the device.
        num_rows: Rows of the batch; a graph may be captured with more.
        max_rank: Largest rank that the tables may hold when the kernels run.
        graph: Whether the launches may be captured. The tables then change before a replay, so
            kernels are launched for as many tiles as the tables can hold.
        adapted: Which of the embedding, the output layer and the experts an adapter has weights
            for.
    """

    tables: BatchTables | RoutedTiles
    num_rows: int
    max_rank: int
    graph: bool
    adapted: frozenset[str]
    use_cuda_graph = False  # of the output layer's own rows

    @property
    def expected_tokens(self) -> int:
        return self.num_rows

    @property
    def has_active_lora(self) -> bool:
        return self.graph or self.max_rank > 0

    def num_tiles(self, num_rows: int) -> int:
        tables = self.tables
        is_captured = self.graph and isinstance(tables, BatchTables)
        num_tiles: int = tables.tiles_for(num_rows) if is_captured else tables.num_tiles
        return num_tiles


class EloraTritonBackend(PagedLoRABackend):
    """A backend with two kernels per module for any mix of adapters. It never blocks the host.

    Batches that CUDA graphs may replay are described in static memory, which each such batch
    overwrites on the forward stream. A prefill batch without adapters overwrites it, too, because
    the graph reads it; for decode there is a second graph for such batches.
    """

    name = TRITON
    supports_prefill_cuda_graph = True
    skip_inactive_dense_lora = True  # capture decode a second time, without LoRA kernels

    def __init__(self, *args: Any, server_args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deterministic = server_args.enable_deterministic_inference
        self._static: dict[Graph, BatchTables] = {}
        self._planes: KVPlanes | None = None
        self._pool: Any = None

    def set_model(
        self, shapes: Sequence[ModuleShape], dtype: torch.dtype, *, max_rank: int, tp_size: int
    ) -> None:
        self._modules: dict[str, StackedModule] = stacked_modules(shapes)
        self._expert_modules = {
            name: module for name, module in self._modules.items() if module.num_experts > 1
        }
        self._dtype = dtype
        self._tp_size = tp_size
        self.max_rank: int = max_rank  # CUDA graphs are captured for this rank

    @override
    def init_decode_cuda_graph_batch_info(
        self, max_bs_in_cuda_graph: int, num_tokens_per_req: int
    ) -> None:
        max_rows = max_bs_in_cuda_graph * num_tokens_per_req
        self._static[Graph.DECODE] = self._tables(
            max_rows, min(max_bs_in_cuda_graph, self.max_adapters), DECODE_TILE_ROWS
        )

    @override
    def init_prefill_cuda_graph_batch_info(
        self, max_num_tokens: int, max_num_requests: int | None = None
    ) -> None:
        self.prefill_cuda_graph_max_tokens = max_num_tokens
        self.prefill_cuda_graph_max_bs = max_num_requests or max_num_tokens
        self._static[Graph.PREFILL] = self._tables(
            max_num_tokens,
            min(self.prefill_cuda_graph_max_bs, self.max_adapters),
            DECODE_TILE_ROWS if self._deterministic else PREFILL_TILE_ROWS,
        )

    def set_batch(self, segments: Sequence[Segment], graph: Graph | None = None) -> None:
        self.batch_info = self._loaded(segments, graph)

    def adapts(self, module: str, batch: LaunchedBatch | None = None) -> bool:
        batch = batch or self._batch
        return batch.graph or module in batch.adapted

    def batch_of(self, segments: Sequence[Segment]) -> LaunchedBatch:
        return self._loaded(segments, None)

    def _loaded(self, segments: Sequence[Segment], graph: Graph | None) -> LaunchedBatch:
        adapters = {id(adapter): adapter for adapter, _ in segments if adapter is not None}
        numbers = {key: number for number, key in enumerate(adapters)}
        batch = Batch(
            self._records(list(adapters.values())),
            [(-1 if adapter is None else numbers[id(adapter)], n) for adapter, n in segments],
        )
        if graph is not None:
            tables, max_rank = self._static[graph], self.max_rank
            assert batch.max_rank <= max_rank, (batch.max_rank, max_rank)
        else:
            num_rows, num_adapters = batch.num_rows, len(batch.records)
            few = num_rows <= 2 * DECODE_TILE_ROWS * num_adapters
            small = few or self._deterministic
            tile_rows = DECODE_TILE_ROWS if small else PREFILL_TILE_ROWS
            tables, max_rank = self._tables(num_rows, num_adapters, tile_rows), batch.max_rank
        tables.load(batch)
        adapted = frozenset(
            module
            for module in (*self.vocabulary, *self._expert_modules)
            if any(adapter.has(module) for adapter in adapters.values())
        )
        return LaunchedBatch(tables, batch.num_rows, max_rank, graph is not None, adapted)

    def routes(self, topk_ids: torch.Tensor) -> LaunchedBatch:
        batch, modules = self._batch, list(self._expert_modules.values())
        assert isinstance(batch.tables, BatchTables)
        own = topk_ids[: batch.tables.max_rows]  # the rows that follow are padding
        tiles = routed_tiles(batch.tables, own.to(torch.int32).contiguous(), modules)
        # Of a captured batch, too, as many tiles as are launched are written.
        return LaunchedBatch(tiles, topk_ids.numel(), batch.max_rank, False, batch.adapted)

    @override
    def run_lora_a_sgemm(
        self, x: torch.Tensor, weights: WeightRef, *args: Any, **options: Any
    ) -> torch.Tensor:
        """As ``shrink``, but with tensor parallelism the splits are summed, since the ranks then
        sum the result."""
        inner = super().run_lora_a_sgemm(x, weights, *args, **options)
        return inner.sum(dim=0, keepdim=True) if self._tp_size > 1 else inner

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        """``A[:, token] * scaling`` of each row's adapter.

        Returns:
            As ``shrink``, with one split.
        """
        batch = self._batch
        assert len(tokens) >= batch.num_rows, (
            f"{EMBEDDING}: {len(tokens)} rows in a batch of {batch.num_rows}"
        )
        return self._looked_up(
            tokens, self._planes_of_forward(), batch, num_tiles=batch.num_tiles(len(tokens))
        )

    def _looked_up(
        self, tokens: torch.Tensor, planes: KVPlanes, batch: LaunchedBatch, num_tiles: int
    ) -> torch.Tensor:
        module = self._modules[EMBEDDING]
        return lora_lookup(
            tokens,
            planes.pool_planes,
            batch.tables,
            module,
            vocab_size=self.vocabulary[EMBEDDING].vocab_size,
            dtype=self._dtype,
            width=module.inner_width(batch.max_rank),
            num_tiles=num_tiles,
        )

    def shrink(
        self, x: torch.Tensor, weights: WeightRef, batch: LaunchedBatch | None = None
    ) -> torch.Tensor:
        """Compute ``x @ A^T * scaling`` of each row's adapter.

        Returns:
            float32 ``[splits, rows, parts * largest rank]``, to be summed over the splits;
            undefined where an adapter has no such column, or a row has no adapter.
        """
        batch, module = batch or self._batch, self._modules[weights.module]
        rows_per_input = 1
        if weights.module in self._expert_modules:
            rows_per_input = max(1, batch.num_rows // max(1, len(x)))
        num_rows = len(x) * rows_per_input
        assert num_rows >= batch.num_rows, (
            f"{weights.module}: {num_rows} rows in a batch of {batch.num_rows}"
        )
        num_tiles = batch.num_tiles(num_rows)
        return lora_shrink(
            x,
            self._planes_of_forward().plane(module.a_plane, weights.layer),
            batch.tables,
            module,
            width=module.inner_width(batch.max_rank),
            num_tiles=num_tiles,
            rows_per_input=rows_per_input,
            config=self._shrink_config(module, batch.tables, num_tiles),
        )

    def expand(
        self,
        inner: torch.Tensor,
        weights: WeightRef,
        output: torch.Tensor,
        batch: LaunchedBatch | None = None,
    ) -> torch.Tensor:
        batch, module = batch or self._batch, self._modules[weights.module]
        num_tiles = batch.num_tiles(len(output))
        return lora_expand(
            inner,
            self._planes_of_forward().plane(module.b_plane, weights.layer),
            batch.tables,
            module,
            output,
            num_tiles=num_tiles,
            config=self._expand_config(module, batch.tables, num_tiles),
        )

    def expand_logits(
        self,
        inner: torch.Tensor,
        output: torch.Tensor,
        batch: LaunchedBatch | None = None,
    ) -> torch.Tensor:
        batch, module = batch or self._batch, self._modules[OUTPUT_LAYER]
        num_tiles = batch.num_tiles(len(output))
        return lora_logits(
            inner,
            self._planes_of_forward().pool_planes,
            batch.tables,
            module,
            output,
            vocab_size=self.vocabulary[OUTPUT_LAYER].vocab_size,
            num_tiles=num_tiles,
            config=self._expand_config(module, batch.tables, num_tiles),
        )

    def warm_up(self, planes: KVPlanes) -> None:
        """Compile every kernel that a batch may launch, by launching it on a batch without rows."""
        logger.info("Compiling LoRA kernels, unless Triton has them in its cache")
        planes.warm_up()
        layers = [(planes.plane(0, i), planes.plane(-1, i)) for i in range(planes.num_layers)]
        # Triton compiles separately for pointers that are multiples of 16 bytes and for others.
        differ = {tuple(plane.data_ptr() % 16 == 0 for plane in layer): layer for layer in layers}
        sizes = [DECODE_TILE_ROWS] if self._deterministic else [DECODE_TILE_ROWS, PREFILL_TILE_ROWS]
        if self._expert_modules:
            self._compile_routes()
        for tile_rows, (name, module) in product(sizes, self._modules.items()):
            for layer in differ.values() if name not in OUTSIDE_LAYERS else [layers[0]]:
                self._compile(name, module, planes, layer, self._tables(1, 1, tile_rows))

    def _compile_routes(self) -> None:
        """Launch what describes routes, for few and for many of them."""
        modules = list(self._expert_modules.values())
        tables = self._tables(MOST_SINGLE_ROUTES + 1, 1, DECODE_TILE_ROWS)
        for num_rows in (1, tables.max_rows):
            ids = torch.zeros(num_rows, 1, dtype=torch.int32, device=self.device)
            routed_tiles(tables, ids, modules)

    def _compile(
        self,
        name: str,
        module: StackedModule,
        planes: KVPlanes,
        layer: tuple[torch.Tensor, torch.Tensor],
        tables: BatchTables,
    ) -> None:
        """Launch the kernels of a module in every configuration, on a batch without rows."""
        # The experts of a row share its input of the first module.
        is_first = name in self._expert_modules and len(module.out_features) > 1
        num_rows = self.experts_per_row if is_first else 1
        x = torch.zeros(1, module.in_features, dtype=self._dtype, device=self.device)
        num_columns, width = sum(module.out_features), module.inner_width(1)
        batch = LaunchedBatch(tables, 1, 1, graph=False, adapted=frozenset())
        inner = None
        if name == EMBEDDING:
            tokens = torch.zeros(1, dtype=torch.int64, device=self.device)
            inner = self._looked_up(tokens, planes, batch, num_tiles=1)
        elif name == OUTPUT_LAYER:
            num_columns = padded(self.vocabulary[OUTPUT_LAYER].vocab_size)  # as SGLang pads them
        output = x.new_zeros(num_rows, num_columns)
        for tiles in tuned_tile_counts(self.device, self._dtype):
            if name != EMBEDDING:
                shrink = self._shrink_config(module, tables, tiles)
                inner = lora_shrink(
                    x,
                    layer[module.a_plane],
                    tables,
                    module,
                    width=width,
                    num_tiles=1,
                    config=shrink,
                    rows_per_input=num_rows,
                )
            expand = self._expand_config(module, tables, tiles)
            if name == OUTPUT_LAYER:
                lora_logits(
                    inner,
                    planes.pool_planes,
                    tables,
                    module,
                    output,
                    vocab_size=self.vocabulary[OUTPUT_LAYER].vocab_size,
                    num_tiles=1,
                    config=expand,
                )
            else:
                plane = layer[module.b_plane]
                lora_expand(inner, plane, tables, module, output, num_tiles=1, config=expand)

    def _shrink_config(self, module: StackedModule, tables: Tiles, num_tiles: int) -> ShrinkConfig:
        tiles = DETERMINISTIC_TILES if self._deterministic else num_tiles
        return shrink_config(self.device, tables.tile_rows, tiles, module.in_features, self._dtype)

    def _expand_config(self, module: StackedModule, tables: Tiles, num_tiles: int) -> ExpandConfig:
        tiles = DETERMINISTIC_TILES if self._deterministic else num_tiles
        return expand_config(
            self.device, tables.tile_rows, tiles, sum(module.out_features), self._dtype
        )

    @property
    def _batch(self) -> LaunchedBatch:
        assert isinstance(self.batch_info, LaunchedBatch), "a forward pass without its batch"
        return self.batch_info

    def _records(self, adapters: Sequence[PagedAdapter]) -> NDArray[np.int32]:
        """The adapters' records, int32 ``[adapters, record_ints]``."""
        names = tuple(self._modules)
        if not adapters:
            return np.empty((0, record_ints(len(names))), dtype=np.int32)
        return np.stack([adapter.record(names) for adapter in adapters])

    def _tables(self, max_rows: int, max_adapters: int, tile_rows: int) -> BatchTables:
        return BatchTables(
            self.device,
            num_modules=len(self._modules),
            max_rows=max_rows,
            max_adapters=max_adapters,
            tile_rows=tile_rows,
            has_experts=bool(self._expert_modules),
        )

    def _planes_of_forward(self) -> KVPlanes:
        """Planes of the current forward pass's KV pool, looked up here because graphs are captured
        before the cache is built."""
        pool = get_token_to_kv_pool()
        if self._planes is None or self._pool is not pool:
            self._pool = pool
            self._planes = planes_of(pool, self._dtype)
        return self._planes
