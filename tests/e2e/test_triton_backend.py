"""The kernels in the real server, under Triton's interpreter where there is no GPU.

With CUDA graphs, as the plugin ``recorded_graphs`` emulates them: captured by SGLang's own graph
runners in SGLang's own order of a start, before the cache is built and an adapter is there. Batches
with more tokens than the graph of prefill run eagerly.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from sglang_elora.testbed.adapters import make_adapters
from sglang_elora.testbed.checkpoint import ModelShape, make_checkpoint
from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess
from tests.harness import peft_kinds
from tests.harness.adapter_specs import SPECS
from tests.harness.client import Answer, Client
from tests.harness.plugin_packages import install_plugin
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

# Every module, the embedding and the output layer too; ranks above and below a tile.
NAMES = ("embedding-and-all", "all-r4", None)
NUM_TOKENS = 3  # because the interpreter takes up to 25 s for a batch
PREFILL_TOKENS = 16
GRAPHS = (
    *("--cuda-graph-bs-decode", "4", "--cuda-graph-bs-prefill", str(PREFILL_TOKENS)),
    *("--cuda-graph-backend-prefill", "full"),
)


@pytest.mark.slow
async def test_triton_backend_outputs_equal_the_reference(
    models: Path,
    logs: Path,
    prompts: Sequence[list[int]],
    tmp_path: Path,
    spawned_start: None,  # Triton's interpreter is chosen when Triton is imported
) -> None:
    """Mixed batches of prefill and decode, then again from the cache in a shorter batch."""
    checkpoint = make_checkpoint(models / "two-layers", shape=ModelShape(num_layers=2))
    specs = [spec for spec in SPECS if spec.name in NAMES]
    adapters = {
        **peft_kinds.make(checkpoint, tmp_path / "kinds", NAMES[:1]),
        **make_adapters(checkpoint, models / "two-layers-adapters", specs),
    }
    reference = Reference(checkpoint, adapters)
    elora = ["--elora", "--elora-check", "--lora-backend", "elora_triton"]
    prompt = prompts[0][: PREFILL_TOKENS // 2]
    install_plugin(tmp_path, "recorded_graphs")

    async def ask(client: Client, names: Sequence[str | None]) -> list[Answer]:
        requests = [client.generate(name, prompt, num_tokens=NUM_TOKENS) for name in names]
        return list(await asyncio.gather(*requests))

    with ServerProcess(
        [*elora, *server_flags(checkpoint, adapters), *GRAPHS],
        log_path=logs / "triton.log",
        program=ELORA_SERVER,
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)},
        startup_timeout_s=400,  # each capture is run three times, by the interpreter
    ) as server:
        for names in (NAMES, NAMES[:2]):
            async with Client(server.url) as client:
                answers = await ask(client, names)
            for name, answer in zip(names, answers, strict=True):
                expected = reference.generate(name, prompt)[:NUM_TOKENS]
                assert list(answer.token_ids) == expected, name
        log = server.log_path.read_text()
    assert "Using elora_triton as backend of LoRA kernels" in log
    cache = log.index("Compiling LoRA kernels")
    for kind in ("prefill CUDA", "decode CPU"):
        assert log.index(f"Capture target {kind} graph end") < cache, kind
    assert re.search(r"Decode batch, #running-req: [23], .*graph: True", log)
    assert re.search(r"Prefill batch, .*#running-req: 0.*graph: True", log)
