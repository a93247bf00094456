"""Linear attention and state spaces of the CPU platform: a prefill equals its tokens one by one."""

from __future__ import annotations

import torch

from sglang_elora.platforms.linear_attention import (
    CHUNK,
    TorchGatedDelta,
    causal_conv1d_fn,
    causal_conv1d_update,
    gates,
    keep_states,
    rms_norm_gated,
    split_projections,
)
from sglang_elora.platforms.state_space import mamba_chunk_scan_combined, selective_state_update

LENGTHS = (3, 150, 1)
STARTS = torch.tensor([0, 3, 153, 154])
SLOTS = torch.tensor([4, 1, 2])


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_convolution_of_a_prompt_equals_that_of_its_tokens() -> None:
    x, weight, bias, states = rand(6, 154), rand(6, 4), rand(6), rand(5, 6, 3, seed=1)
    before, goes_on = states.clone(), torch.tensor([True, True, False])
    output = causal_conv1d_fn(x, weight, bias, states, STARTS, None, SLOTS, goes_on)
    before[2] = 0
    for i, length in enumerate(LENGTHS):
        for at in range(length):
            own = STARTS[i] + at
            found = causal_conv1d_update(
                x[:, own][None], before, weight, bias, "silu", conv_state_indices=SLOTS[i : i + 1]
            )
            torch.testing.assert_close(output[:, own], found[0])
    torch.testing.assert_close(states, before)


def test_gated_delta_rule_of_a_prompt_equals_that_of_its_tokens() -> None:
    heads, size = 4, 8
    q, k = (rand(1, 154, 2, size, seed=i) for i in range(2))
    v, a, b = rand(1, 154, heads, size, seed=2), rand(154, heads, seed=3), rand(154, heads, seed=4)
    log, bias, states = rand(heads), rand(heads), rand(5, heads, size, size)
    before, rule = states.clone(), TorchGatedDelta()
    decay, beta = gates(log, a, b, bias)
    output, _, kept = rule.extend(
        q, k, v, decay, beta, ssm_states=states, cache_indices=SLOTS, query_start_loc=STARTS
    )
    kept_by_steps = []
    for i, length in enumerate(LENGTHS):
        for at in range(length):
            if at % CHUNK == 0:
                kept_by_steps.append(before[SLOTS[i]].clone())
            own = slice(int(STARTS[i]) + at, int(STARTS[i]) + at + 1)
            found = rule.decode(
                *(tensor[:, own] for tensor in (q, k, v)),
                *(a[own], b[own]),
                A_log=log,
                dt_bias=bias,
                ssm_states=before,
                cache_indices=SLOTS[i : i + 1],
            )
            torch.testing.assert_close(output[:, own], found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[0], torch.stack(kept_by_steps), rtol=1e-4, atol=1e-5)


def test_state_space_of_a_prompt_equals_that_of_its_tokens() -> None:
    heads, size, state_size = 4, 5, 3
    x, dt = rand(1, 154, heads, size), rand(1, 154, heads, seed=1)
    keys, queries = (rand(1, 154, 2, state_size, seed=i) for i in (2, 3))
    decay, skip, bias = -rand(heads).exp(), rand(heads, seed=4), rand(heads, seed=5)
    states = rand(5, heads, size, state_size)
    initial, output = states[SLOTS], torch.empty_like(x)
    asked = {"track_seq_idx": torch.tensor([1]), "track_end_locs": torch.tensor([3 + CHUNK])}
    kept, finals, tracked = mamba_chunk_scan_combined(
        x,
        dt,
        decay,
        keys,
        queries,
        CHUNK,
        D=skip,
        dt_bias=bias,
        cu_seqlens=STARTS,
        out=output,
        initial_states=initial,
        **asked,
    )
    by_steps = {}
    for i, length in enumerate(LENGTHS):
        for at in range(length):
            own, found = int(STARTS[i]) + at, torch.empty(1, heads, size)
            selective_state_update(
                states,
                x[:, own],
                dt[:, own, :, None].expand(-1, -1, size),
                decay[:, None, None].expand(-1, size, state_size),
                keys[:, own],
                queries[:, own],
                skip[:, None].expand(-1, size),
                dt_bias=bias[:, None].expand(-1, size),
                state_batch_indices=SLOTS[i : i + 1],
                out=found,
            )
            torch.testing.assert_close(output[:, own], found, rtol=1e-4, atol=1e-4)
            by_steps[own + 1] = states[SLOTS[i]].clone()
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(finals, states[SLOTS], **close)
    assert tracked is not None
    torch.testing.assert_close(tracked[0, 0], by_steps[3 + CHUNK], **close)
    for chunk in (1, 2):  # of the batch, not of a request
        torch.testing.assert_close(kept[0, chunk], by_steps[chunk * CHUNK], **close)


def test_states_are_kept_of_the_requests_that_ask_for_it() -> None:
    conv, ssm = rand(5, 2), rand(5, 3)
    before = conv.clone(), ssm.clone()
    keep_states(conv, ssm, SLOTS, torch.tensor([True, False, True]), torch.tensor([0, 3, 3]), 3)
    for now, then in zip((conv, ssm), before, strict=True):
        torch.testing.assert_close(now, then[[4, 1, 2, 2, 4]])


def test_gated_norm_is_that_of_groups_and_the_gate_comes_before_or_after() -> None:
    x, z, weight = rand(7, 12), rand(7, 12, seed=1), rand(12, seed=2)
    gate = torch.nn.functional.silu(z)
    options = {"weight": weight, "bias": None, "z": z, "eps": 1e-6, "is_rms_norm": True}
    after = torch.nn.functional.rms_norm(x, (12,), weight, 1e-6) * gate
    torch.testing.assert_close(rms_norm_gated(x=x, **options), after)
    groups = (x * gate).unflatten(-1, (3, 4))
    before = torch.nn.functional.rms_norm(groups, (4,), None, 1e-6).flatten(-2) * weight
    found = rms_norm_gated(x=x, group_size=4, norm_before_gate=False, **options)
    torch.testing.assert_close(found, before)


def test_projections_are_split_where_sglang_stacks_them() -> None:
    qkvz, ba = rand(5, 2 * 2 * 3 + 2 * 4 * 6), rand(5, 8)
    qkv, z, b, a = split_projections(qkvz, ba, 2, 4, 3, 6)
    torch.testing.assert_close(torch.cat((qkv, z.flatten(1)), 1), qkvz)
    torch.testing.assert_close(torch.cat((b, a), 1), ba)
    assert z.shape == (5, 4, 6)
