"""The kernels in the real server, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from client import Answer, Client, run
from reference import Reference
from server_flags import server_flags
from sglang_elora.demo.server import ELORA_SERVER, ServerProcess

# Every module, ranks above and below a tile.
NAMES = ("attention-r24", "all-r4", None)


def test_outputs_equal_the_reference(
    checkpoint: Path,
    adapters: dict[str, Path],
    logs: Path,
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    """Mixed batches of prefill and decode, then again from the cache in a shorter batch.

    Two tokens, because the interpreter takes up to 25 s for a batch.
    """
    few = {name: adapters[name] for name in NAMES if name is not None}
    flags = ["--elora", "--elora-check", "--lora-backend", "elora_triton"]

    async def ask(client: Client, names: Sequence[str | None]) -> list[Answer]:
        requests = [client.generate(name, prompts[0], num_tokens=2) for name in names]
        return list(await asyncio.gather(*requests))

    with ServerProcess(
        [*flags, *server_flags(checkpoint, few)],
        log_path=logs / "triton.log",
        program=ELORA_SERVER,
        env={"TRITON_INTERPRET": "1"},
    ) as server:
        for names in (NAMES, NAMES[:2]):
            answers = run(server.url, lambda client, names=names: ask(client, names))
            for name, answer in zip(names, answers, strict=True):
                assert list(answer.token_ids) == reference.generate(name, prompts[0])[:2], name
        log = server.log_path.read_text()
    assert "Using elora_triton as backend of LoRA kernels" in log
