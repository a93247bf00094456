"""Attention of the CPU platform, whose prefill computes only the new tokens of a request.

SGLang's ``torch_native`` backend pads the queries to the whole sequence and drops the outputs of
cached tokens, so that prefill with a cached prefix costs as much as without. Here only new tokens
are queries, as on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import override


class CpuAttention(TorchNativeAttnBackend):
    """``torch_native`` with its own prefill for causal attention without a sliding window."""

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
        if (
            encoder_lens is not None
            or not options["causal"]
            or options.get("sliding_window_size") is not None
        ):
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
            if num_cached:
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


def _heads_first(tokens: torch.Tensor) -> torch.Tensor:
    """A view of ``[tokens, heads, head_dim]`` as ``[1, heads, tokens, head_dim]``."""
    return tokens.movedim(0, 1).unsqueeze(0)


def use_cpu_attention() -> None:
    """Register ``CpuAttention`` as SGLang's ``torch_native`` backend in this process."""
    register_attention_backend("torch_native")(CpuAttention)
