"""State-space layers (Mamba 2) of the CPU platform, which SGLang computes with kernels of a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import softplus

from sglang_elora.platforms.linear_attention import causal_conv1d_fn, causal_conv1d_update


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    *,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    initial_states: torch.Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    track_seq_idx: torch.Tensor | None = None,
    track_end_locs: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The recurrence of several requests' tokens, written to ``out``.

    Args:
        x: ``[1, tokens, heads, head size]``, request after request.
        dt: ``[1, tokens, heads]``, before its bias and softplus.
        A: ``[heads]``, negative; as ``D`` and ``dt_bias``.
        B: ``[1, tokens, groups, state size]``, as ``C``.
        chunk_size: Tokens after which a state is kept.
        cu_seqlens: ``[requests + 1]``: where each request's tokens begin.
        initial_states: ``[requests, heads, head size, state size]``; None: zeros.
        track_seq_idx: Requests of which a state is asked for.
        track_end_locs: After how many of the batch's tokens, for each of these.

    Returns:
        The states after each whole chunk of the batch, ``[1, chunks, ...]``, the first of which is
        zero; those after each request; and those that were asked for, ``[1, number, ...]``.
    """
    steps = softplus(dt[0].float() + dt_bias.float())
    repeats = x.shape[2] // B.shape[2]
    keys, queries = (t[0].float().repeat_interleave(repeats, 1) for t in (B, C))
    num_tokens, num_heads, size = x.shape[1:]
    shape = (num_heads, size, B.shape[3])
    kept = x.new_zeros(-(-num_tokens // chunk_size), *shape, dtype=torch.float32)
    asked = [] if track_seq_idx is None else list(enumerate(track_seq_idx.tolist()))
    ends = [] if track_end_locs is None else track_end_locs.tolist()
    answers, finals = x.new_zeros(len(asked), *shape, dtype=torch.float32), []
    for request, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        own = [(ends[i], i) for i, owner in asked if owner == request]
        stops = {end, *(stop for stop, _ in own)}
        stops.update(range(-(-(begin + 1) // chunk_size) * chunk_size, end, chunk_size))
        state = torch.zeros(shape) if initial_states is None else initial_states[request].float()
        start = begin
        for stop in sorted(stops):
            rows = slice(start, stop)
            found, state = _scan(
                x[0, rows].float(), steps[rows], A.float(), keys[rows], queries[rows], state
            )
            out[0, rows] = (found + D[:, None] * x[0, rows]).to(out.dtype)
            if stop % chunk_size == 0 and stop // chunk_size < len(kept):
                kept[stop // chunk_size] = state
            for at, i in own:
                if at == stop:
                    answers[i] = state
            start = stop
        finals.append(state)
    dtype = state_dtype or x.dtype
    return kept[None], torch.stack(finals).to(dtype), answers[None] if asked else None


def _scan(
    x: torch.Tensor,
    steps: torch.Tensor,
    A: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output ``[tokens, heads, size]`` of one request's tokens, and the state after them."""
    if len(x) == 0:
        return x, state
    decay = (steps * A).cumsum(0)
    between = decay[:, None] - decay[None]  # [to, from, heads]
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = between.masked_fill(later[..., None], float("-inf")).exp() * steps
    weights *= torch.einsum("thn,shn->tsh", queries, keys)
    output = torch.einsum("tsh,shp->thp", weights, x)
    output += decay.exp()[..., None] * torch.einsum("thn,hpn->thp", queries, state)
    rest = (decay[-1] - decay).exp() * steps
    added = torch.einsum("sh,shp,shn->hpn", rest, x, keys)
    return output, decay[-1].exp()[:, None, None] * state + added


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    *,
    dt_bias: torch.Tensor,
    state_batch_indices: torch.Tensor,
    out: torch.Tensor,
    disable_state_update: bool = False,
    **_: Any,
) -> None:
    """One token of each request, written to ``out``; the states are updated.

    Args:
        state: ``[slots, heads, head size, state size]``.
        x: ``[requests, heads, head size]``, as ``dt``.
        A: ``[heads, head size, state size]``.
        B: ``[requests, groups, state size]``, as ``C``.
        D: ``[heads, head size]``, as ``dt_bias``.
        state_batch_indices: ``[requests]``: their slots.
    """
    assert not disable_state_update, "drafted tokens"
    slots, repeats = state_batch_indices.long(), x.shape[1] // B.shape[1]
    keys, queries = (t.float().repeat_interleave(repeats, 1)[:, :, None] for t in (B, C))
    steps, values = softplus(dt.float() + dt_bias.float())[..., None], x.float()[..., None]
    states = state[slots].float() * (steps * A).exp() + steps * keys * values
    state[slots] = states.to(state.dtype)
    out.copy_((states * queries).sum(-1) + D * x)


def use_torch_state_spaces() -> None:
    """Put the functions here in the place of SGLang's kernels."""
    from sglang.kernels.ops.mamba import triton_ops

    triton_ops.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    triton_ops.selective_state_update = selective_state_update
    from sglang.srt.layers.attention.mamba import mamba

    mamba.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    mamba.selective_state_update = selective_state_update
    for suffix in ("", "_triton"):
        setattr(mamba, f"causal_conv1d_fn{suffix}", causal_conv1d_fn)
        setattr(mamba, f"causal_conv1d_update{suffix}", causal_conv1d_update)
