"""Attention of the CPU platform, whose prefill computes only the new tokens of a request.

SGLang's ``torch_native`` backend pads the queries to the whole sequence and drops the outputs of
cached tokens, so that prefill with a cached prefix costs as much as without. Here only new tokens
are queries, as on a GPU.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
    AttnForwardMethod,
)
from torch.nn.functional import pad, scaled_dot_product_attention
from typing_extensions import override

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class CpuAttention(TorchNativeAttnBackend):
    """``torch_native`` with its own causal attention, which knows a KV pool of sliding windows,
    sinks, and drafted trees."""

    _tree_mask: torch.Tensor | None = None  # of the batch that is being verified
    _sinks: torch.Tensor | None = None  # ``[heads]``, of the current layer
    _slots_of_layer: torch.Tensor | None = None  # by slots of full attention, if they differ

    @override
    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of new tokens ``[tokens, heads * head_dim]``.

        The drafted tokens of a request see its verified tokens and what the draft's mask has: bool
        ``[drafted, verified + drafted]``, request after request.
        """
        batch = forward_batch
        if forward_batch.forward_mode.is_target_verify():
            batch, draft = copy(forward_batch), forward_batch.spec_info
            batch.extend_prefix_lens = batch.seq_lens
            batch.extend_seq_lens = torch.full_like(batch.seq_lens, draft.draft_token_num)
            self._tree_mask = draft.custom_mask
        self._begin_layer(layer, sinks)
        try:
            result: torch.Tensor = super().forward_extend(q, k, v, layer, batch, save_kv_cache)
        finally:
            self._tree_mask = None
        return result

    @override
    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        *args: Any,
        sinks: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Attention of one new token per request ``[requests, heads * head_dim]``."""
        self._begin_layer(layer, sinks)
        result: torch.Tensor = super().forward_decode(q, k, v, layer, *args, **options)
        return result

    def _begin_layer(self, layer: RadixAttention, sinks: torch.Tensor | None) -> None:
        self._sinks, self._slots_of_layer = sinks, None
        if self.use_sliding_window_kv_pool:
            pool = self.token_to_kv_pool
            _, has_window = pool.layers_mapping[layer.layer_id]
            if has_window:
                self._slots_of_layer = pool.full_to_swa_index_mapping

    @override
    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Prefill attention, written to ``output`` and returned.

        Args:
            query: ``[new tokens, heads, head_dim]``, request after request.
            output: Has the same shape; is written.
            k_cache: ``[slots, kv heads, head_dim]``, as ``v_cache``.
            req_to_token: int32 ``[requests, context]``: slots of each row's tokens.
        """
        if encoder_lens is not None or not options["causal"]:
            result: torch.Tensor = super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                **options,
            )
            return result
        start, tree_mask = 0, self._tree_mask
        window = options.get("sliding_window_size")
        counts = (req_pool_indices, extend_prefix_lens, extend_seq_lens)
        for row, num_cached, num_new in zip(*(count.tolist() for count in counts), strict=True):
            first = 0 if window is None else max(0, num_cached - window)
            slots = req_to_token[row, first : num_cached + num_new]
            if self._slots_of_layer is not None:
                slots = self._slots_of_layer[slots]
            drafted = None
            if tree_mask is not None:
                num_seen = num_new * (num_cached + num_new)
                drafted, tree_mask = tree_mask[:num_seen].view(num_new, -1), tree_mask[num_seen:]
            found = scaled_dot_product_attention(
                _heads_first(query[start : start + num_new]),
                *(self._read(cache, slots, query.dtype) for cache in (k_cache, v_cache)),
                **self._masks(num_cached, num_new, window, first, drafted, query.dtype),
                scale=options["scaling"],
                enable_gqa=options["enable_gqa"],
            )
            output[start : start + num_new] = found.squeeze(0).movedim(1, 0)
            start += num_new
        return output

    @override
    def _run_sdpa_forward_decode(self, *batch: Any, **options: Any) -> torch.Tensor:
        """As ``_run_sdpa_forward_extend`` for one new token per request, with the arguments of
        SGLang's: those of prefill without its two lengths."""
        *tensors, seq_lens, encoder_lens = batch
        if encoder_lens is not None or (self._sinks is None and self._slots_of_layer is None):
            result: torch.Tensor = super()._run_sdpa_forward_decode(*batch, **options)
            return result
        as_prefill: list[Any] = [*tensors, seq_lens, seq_lens - 1, torch.ones_like(seq_lens)]
        return self._run_sdpa_forward_extend(*as_prefill, **{**options, "causal": True})

    def _read(self, cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """K or V of these slots; with sinks, one more of zeros."""
        found = _heads_first(cache[slots].to(dtype))
        return found if self._sinks is None else pad(found, (0, 0, 0, 1))

    def _masks(
        self,
        num_cached: int,
        num_new: int,
        window: int | None,
        first: int,
        drafted: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Which tokens from ``first`` on the new tokens of a request see, as arguments of
        ``scaled_dot_product_attention``.

        Args:
            window: Most tokens before itself that a token sees.
            drafted: bool ``[drafted, cached + drafted]``; None: the new tokens are a sequence.
        """
        is_whole = num_cached == 0 and (window is None or num_new <= window + 1)
        if is_whole and drafted is None and self._sinks is None:
            return {"is_causal": True}
        if drafted is None:
            length, num_before = num_cached + num_new - first, num_cached - first
            seen = torch.ones(num_new, length, dtype=torch.bool).tril(num_before)
            seen = seen if window is None else seen.triu(num_before - window)
        else:
            seen = drafted if window is None else within_window(drafted, num_cached, window)
            seen = seen[:, first:]
        if self._sinks is None:
            return {"attn_mask": seen}
        # The sink is a token whose K and V are zero and whose logit is given.
        sinks = self._sinks.float().view(-1, 1, 1).expand(-1, num_new, 1)
        logits = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).expand(len(sinks), -1, -1)
        return {"attn_mask": torch.cat((logits, sinks), -1).to(dtype)}


def within_window(seen: torch.Tensor, num_cached: int, window: int) -> torch.Tensor:
    """Limit what drafted tokens see to tokens at most ``window`` positions before them.

    Args:
        seen: bool ``[drafted, cached + drafted]``; of the drafted ones, itself and its ancestors.
        num_cached: Number of tokens before the drafted ones.
        window: As SGLang's ``sliding_window_size``.
    """
    own = num_cached + seen[:, num_cached:].sum(-1) - 1  # positions of the drafted tokens
    positions = torch.cat([torch.arange(num_cached), own])
    return seen & (positions >= own[:, None] - window)


def _heads_first(tokens: torch.Tensor) -> torch.Tensor:
    """A view of ``[tokens, heads, head_dim]`` as ``[1, heads, tokens, head_dim]``."""
    return tokens.movedim(0, 1).unsqueeze(0)


def use_cpu_attention() -> None:
    """Register ``CpuAttention`` as SGLang's ``torch_native`` backend in this process.

    Multi-head latent attention is computed from the latent KV in prefill, too: ``torch_native``
    reads K and V from the pool.
    """
    register_attention_backend("torch_native")(CpuAttention)
    AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)
