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
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import override

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class CpuAttention(TorchNativeAttnBackend):
    """``torch_native`` with its own prefill for causal attention without a sliding window, and with
    the verification of drafted trees."""

    _tree_mask: torch.Tensor | None = None  # of the batch that is being verified

    @override
    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
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
        try:
            result: torch.Tensor = super().forward_extend(q, k, v, layer, batch, save_kv_cache)
        finally:
            self._tree_mask = None
        return result

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
        tree_mask, has_window = self._tree_mask, options.get("sliding_window_size") is not None
        is_ours = options["causal"] and (tree_mask is not None or not has_window)
        if encoder_lens is not None or not is_ours:
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
        start = 0
        counts = (req_pool_indices, extend_prefix_lens, extend_seq_lens)
        for row, num_cached, num_new in zip(*(count.tolist() for count in counts), strict=True):
            slots = req_to_token[row, : num_cached + num_new]
            k, v = (_heads_first(cache[slots].to(query.dtype)) for cache in (k_cache, v_cache))
            seen = None
            if tree_mask is not None:
                num_seen = num_new * len(slots)
                seen, tree_mask = tree_mask[:num_seen].view(num_new, -1), tree_mask[num_seen:]
                if has_window:
                    seen = within_window(seen, num_cached, options["sliding_window_size"])
            elif num_cached:
                seen = torch.ones(num_new, len(slots), dtype=torch.bool).tril(num_cached)
            found = scaled_dot_product_attention(
                _heads_first(query[start : start + num_new]),
                k,
                v,
                attn_mask=seen,
                is_causal=seen is None,
                scale=options["scaling"],
                enable_gqa=options["enable_gqa"],
            )
            output[start : start + num_new] = found.squeeze(0).movedim(1, 0)
            start += num_new
        return output


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
