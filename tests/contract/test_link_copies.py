"""The emulated link delays SGLang's own copies of adapters and KV, with and without ELORA."""

from __future__ import annotations

import pytest

from tests.harness.programs import source
from tests.harness.run_python import RunPython


@pytest.mark.parametrize("elora", ["0", "1"])
def test_adapter_and_kv_copies_take_the_emulated_links_time(
    elora: str, run_python: RunPython
) -> None:
    result = run_python(
        "-c",
        source("link_copies"),
        SGLANG_ELORA=elora,
        SGLANG_ELORA_LINK_GBYTES_PER_S="0.001",
        SGLANG_ELORA_LINK_LATENCY_US="1000",
        SGLANG_ELORA_LINK_TO_HOST_GBYTES_PER_S="0.001",
    )
    assert result.returncode == 0, result.stderr
    assert "emulated" in result.stdout


def test_emulated_link_is_refused_on_a_real_device(run_python: RunPython) -> None:
    result = run_python(
        "-c",
        "import sglang_elora.plugin; sglang_elora.plugin.load()",
        SGLANG_ELORA_LINK_GBYTES_PER_S="1",
        SGLANG_USE_CPU_ENGINE="1",
    )
    assert result.returncode != 0
    assert "--elora-link-gbytes-per-s is for the CPU platform only" in result.stderr
