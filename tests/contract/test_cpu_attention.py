"""Prefill of the CPU platform gives what SGLang's torch_native gives."""

from __future__ import annotations

import json
import warnings

import pytest

from tests.harness.programs import source
from tests.harness.run_python import RunPython


@pytest.mark.parametrize(
    ("requests", "heads", "kv_heads", "window"),
    [
        ([(0, 7)], 4, 4, None),
        ([(40, 1), (0, 9), (17, 5)], 4, 2, None),
        ([(3, 30), (50, 14)], 8, 1, None),
        ([(3, 30), (50, 14)], 4, 2, 6),
    ],
)
def test_cpu_attention_prefill_after_a_cached_prefix_equals_the_reference(
    run_python: RunPython,
    requests: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    window: int | None,
) -> None:
    arguments = json.dumps([requests, heads, kv_heads, window])
    result = run_python("-c", source("cpu_attention"), arguments)
    assert result.returncode == 0, result.stderr
    difference, largest = json.loads(result.stdout)
    assert largest > 0.5
    assert difference < 1e-5


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
