"""Attention of the CPU platform: cached prefixes, sliding windows, sinks, drafted trees."""

from __future__ import annotations

import json
import warnings

import pytest

from tests.harness.programs import source
from tests.harness.run_python import RunPython


def test_cpu_attention_is_a_softmax_over_the_tokens_that_are_seen(run_python: RunPython) -> None:
    batches = [  # (cached and new tokens of each request, heads, kv heads, window, own pool)
        ([(0, 7)], 4, 4, None, False),
        ([(40, 1), (0, 9), (17, 5)], 4, 2, None, False),
        ([(3, 30), (50, 14)], 8, 1, None, False),
        ([(3, 30), (50, 14)], 4, 2, 6, False),
        ([(3, 30), (50, 1), (0, 4)], 4, 2, 6, True),
    ]
    cases = [
        (*batch, is_decode, has_sinks, dtype)
        for batch in batches
        for is_decode in (False, True)
        for has_sinks in (False, True)
        for dtype in ("float32", "bfloat16")
    ]
    result = run_python("-c", source("cpu_attention"), json.dumps(cases))
    assert result.returncode == 0, result.stderr
    for case, (difference, largest) in zip(cases, json.loads(result.stdout), strict=True):
        assert largest > 0.5 and difference < (1e-5 if case[-1] == "float32" else 0.05), case


@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_windows_of_drafted_tokens_go_by_their_positions(window: int) -> None:
    """Two branches: 4 -> 5 -> 6 and 4 -> 5', after four cached tokens."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.platforms.attention import within_window

    positions, ancestors = [0, 1, 2, 3, 4, 5, 6, 5], [{0}, {0, 1}, {0, 1, 2}, {0, 3}]
    seen = torch.ones(4, 8, dtype=torch.bool)
    for node, path in enumerate(ancestors):
        seen[node, 4:] = torch.tensor([other in path for other in range(4)])
    found = within_window(seen, 4, window)
    for node in range(4):
        for key, position in enumerate(positions):
            near = position >= positions[4 + node] - window
            assert found[node, key] == (bool(seen[node, key]) and near)
