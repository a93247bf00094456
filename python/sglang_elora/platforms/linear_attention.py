"""Linear attention of the CPU platform: what Qwen3.5's layers compute with kernels of a GPU.

The gated delta rule is transformers' own, in torch. Convolution and gates are a few operations.
SGLang has CPU forms of these too, in a compiled library that needs AMX.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import conv1d, silu, softplus


@cache
def _transformers() -> Any:
    """Transformers' Qwen3.5, imported when it is needed."""
    return import_module("transformers.models.qwen3_5.modeling_qwen3_5")


CHUNK = 64
"""Tokens after which SGLang may keep a state: its kernels' chunk."""
_ACTIVATIONS = {"silu": silu, "swish": silu, "sigmoid": torch.sigmoid}


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: Sequence[int] | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | bool | None = "silu",
    **_: Any,
) -> torch.Tensor:
    """Depthwise causal convolution of several requests' tokens, ``[channels, tokens]``.

    Args:
        x: ``[channels, tokens]``, request after request.
        weight: ``[channels, width]``.
        conv_states: ``[slots, channels, width - 1]``: the last inputs of each request; updated.
        query_start_loc: ``[requests + 1]``: where each request's tokens begin.
        cache_indices: ``[requests]``, their slots; negative: none.
        has_initial_state: bool ``[requests]``: whether a slot holds inputs from before.
    """
    assert cache_indices is not None and has_initial_state is not None
    output, width = torch.zeros_like(x), weight.shape[1]
    ends, continues = query_start_loc.tolist(), has_initial_state.tolist()
    for (begin, end), slot, goes_on in zip(
        pairwise(ends), cache_indices.tolist(), continues, strict=True
    ):
        if slot < 0 or begin == end:
            continue
        before = conv_states[slot].to(x.dtype)
        inputs = torch.cat((before if goes_on else torch.zeros_like(before), x[:, begin:end]), 1)
        found = conv1d(inputs[None], weight[:, None].to(x.dtype), bias, groups=len(x))[0]
        output[:, begin:end] = found[:, found.shape[1] - (end - begin) :]
        conv_states[slot] = inputs[:, inputs.shape[1] - (width - 1) :]
    return silu(output) if activation else output


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    intermediate_conv_window: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """As ``causal_conv1d_fn`` for one new token of each request: ``[requests, channels]``."""
    assert conv_state_indices is not None and intermediate_conv_window is None, "drafted tokens"
    slots = conv_state_indices.long()
    inputs = torch.cat((conv_state[slots].to(x.dtype), x[:, :, None]), -1)
    conv_state[slots] = inputs[:, :, 1:].to(conv_state.dtype)
    found = (inputs[:, :, -weight.shape[1] :] * weight).sum(-1)
    if bias is not None:
        found = found + bias
    return silu(found) if activation else found


def gates(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decay in log space, and how much of a new value is taken: float32 ``[1, tokens, heads]``.

    Args:
        A_log: ``[heads]``, as ``dt_bias``.
        a: ``[tokens, heads]``, as ``b``.
    """
    decay = -A_log.float().exp() * softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


class TorchGatedDelta:
    """The gated delta rule in torch, with the methods of SGLang's ``TritonGDNKernel``.

    Queries and keys are ``[1, tokens, key heads, key size]``, values ``[1, tokens, value heads,
    value size]``; states are ``[slots, value heads, value size, key size]``, and updated.
    """

    supports_packed_decode = False
    uses_state_checkpoints = False
    supports_fused_chain_verify = False
    supports_strided_target_verify_qkv = False
    supports_track_state_snapshot = False

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """One token per request."""
        decay, beta = gates(A_log, a, b, dt_bias)
        slots = cache_indices.long()
        rows = [tensor.transpose(0, 1) for tensor in (*_repeated(q, k, v), v, decay, beta)]
        output, state = _transformers().torch_recurrent_gated_delta_rule(
            *rows,
            initial_state=ssm_states[slots].transpose(-1, -2),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        ssm_states[slots] = state.transpose(-1, -2).to(ssm_states.dtype)
        return output.transpose(0, 1)

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        """Several tokens per request. The states are updated in their slots.

        Returns:
            The output; None; and the states before each chunk of ``CHUNK`` tokens of a request,
            request after request: ``[1, chunks, value heads, value size, key size]``.
        """
        output, states = torch.zeros_like(v), [ssm_states[:0]]
        q, k = _repeated(q, k, v)
        slots = cache_indices.tolist()
        for (begin, end), slot in zip(pairwise(query_start_loc.tolist()), slots, strict=True):
            for start in range(begin, end, CHUNK):
                chunk, state = slice(start, min(start + CHUNK, end)), ssm_states[slot][None]
                states.append(state.clone())
                output[:, chunk], state = _transformers().torch_chunk_gated_delta_rule(
                    *(tensor[:, chunk] for tensor in (q, k, v, g, beta)),
                    chunk_size=CHUNK,
                    initial_state=state.transpose(-1, -2),
                    output_final_state=True,
                    use_qk_l2norm_in_kernel=True,
                )
                ssm_states[slot] = state[0].transpose(-1, -2).to(ssm_states.dtype)
        return output, None, torch.cat(states)[None]


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries and keys with as many heads as values."""
    repeats = v.shape[2] // q.shape[2]
    return q.repeat_interleave(repeats, 2), k.repeat_interleave(repeats, 2)


def split_projections(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, ...]:
    """The input of the convolution, z, b and a, from ``[tokens, q | k | v | z]`` and ``[tokens, b |
    a]``."""
    num_channels = 2 * num_heads_qk * head_qk + num_heads_v * head_v
    z = mixed_qkvz[:, num_channels:].reshape(-1, num_heads_v, head_v)
    b, a = (mixed_ba[:, i * num_heads_v : (i + 1) * num_heads_v].contiguous() for i in range(2))
    return mixed_qkvz[:, :num_channels].contiguous(), z.contiguous(), b, a


def rms_norm_gated(
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> torch.Tensor:
    """RMS norm of the last dimension, multiplied by a gate after it or before."""
    assert is_rms_norm and bias is None
    gate = 1 if z is None else _ACTIVATIONS[activation](z.reshape(x.shape).float())
    values = x.float() if norm_before_gate else x.float() * gate
    groups = values.unflatten(-1, (-1, group_size or values.shape[-1]))
    normed = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    values = normed.flatten(-2) * weight.float()
    return (values * gate if norm_before_gate else values).to(x.dtype)


def sigmoid_mul(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """``attn_output * sigmoid(gate)``."""
    assert not quant
    return attn_output * gate.reshape(attn_output.shape).sigmoid()


def gate_shared_experts(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
) -> None:
    """Write ``shared_output`` times each token's gate to ``output``, or add it.

    Args:
        hidden_states: ``[tokens, hidden_size]``, as the outputs.
        gate_weight: ``[hidden_size]``.
    """
    gated = shared_output * (hidden_states @ gate_weight).sigmoid()[:, None]
    output.copy_(output + gated if do_add else gated)


def keep_states(
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Copy the states of some requests to other slots.

    Args:
        conv_states: ``[slots, ...]``, as ``ssm_states``.
        cache_indices: ``[requests]``, their slots, as ``mamba_track_indices``: where to.
        mamba_track_mask: bool ``[requests]``: which of them.
    """
    rows = mamba_track_mask[:batch_size].nonzero().flatten()
    sources, targets = cache_indices[rows].long(), mamba_track_indices[rows].long()
    for states in (conv_states, ssm_states):
        states[targets] = states[sources]


def keep_states_of_all_layers(
    conv_states_pool: torch.Tensor, ssm_states_pool: torch.Tensor, *args: Any, **options: Any
) -> None:
    """As ``keep_states``, for states of all layers: ``[layers, slots, ...]``."""
    for conv_states, ssm_states in zip(conv_states_pool, ssm_states_pool, strict=True):
        keep_states(conv_states, ssm_states, *args, **options)


def use_torch_linear_attention() -> None:
    """Put the functions here in the place of SGLang's kernels, before models import them."""
    from sglang.kernels.ops.attention import triton_gdn_fused_proj
    from sglang.kernels.ops.attention.fla import layernorm_gated
    from sglang.kernels.ops.attention.linear import fused_gdn_gating
    from sglang.kernels.ops.elementwise import elementwise
    from sglang.kernels.ops.mamba import causal_conv1d_triton, mamba_state_scatter_triton
    from sglang.srt.layers.attention.linear.kernels import gdn_triton

    causal_conv1d_triton.causal_conv1d_fn = causal_conv1d_fn
    causal_conv1d_triton.causal_conv1d_update = causal_conv1d_update
    fused_gdn_gating.fused_gdn_gating = gates
    gdn_triton.TritonGDNKernel = TorchGatedDelta
    mamba_state_scatter_triton.track_mamba_states_if_needed = keep_states
    mamba_state_scatter_triton.track_mamba_states_all_layers = keep_states_of_all_layers
    triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous = split_projections
    layernorm_gated.rms_norm_gated = rms_norm_gated
    elementwise.fused_sigmoid_mul = sigmoid_mul
    elementwise._launch_fused_gate_sigmoid_mul = gate_shared_experts
