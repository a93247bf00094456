"""What stock SGLang answers with each kind of adapter that PEFT saves, beside HF + PEFT.

    python -m benchmarks.outputs.stock [--kinds NAME ...]

One server per kind, given the adapter at start with ``--lora-target-modules all``; three prompts,
32 greedy tokens. ELORA's answers to the same adapters: ``tests/e2e/test_peft_options.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from pathlib import Path

import httpx

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from sglang_elora.bench.plain_table import plain_table  # noqa: E402
from sglang_elora.testbed.checkpoint import make_checkpoint  # noqa: E402
from sglang_elora.testbed.server import (  # noqa: E402
    ServerProcess,
    ServerStartError,
    python_module,
)
from tests.harness import peft_kinds  # noqa: E402
from tests.harness.client import Client  # noqa: E402
from tests.harness.reference import Reference  # noqa: E402
from tests.harness.server_flags import server_flags  # noqa: E402


def outcome(checkpoint: Path, name: str, path: Path, folder: Path) -> str:
    """What stock does with the adapter."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 600) for _ in range(length)] for length in (6, 40, 90)]
    flags = [*server_flags(checkpoint, {name: path}), "--lora-target-modules", "all"]
    server = ServerProcess(
        flags, program=python_module("sglang.launch_server"), log_path=folder / f"{name}.log"
    )
    try:
        with server:
            try:
                answers = asyncio.run(ask(server.url, name, prompts))
            except (httpx.HTTPError, AssertionError) as error:
                ended = "" if server.returncode is None else ", and the server ended"
                return f"fails at the first request{ended}: {type(error).__name__}"
    except ServerStartError:
        errors = [line for line in server.log_tail(200).splitlines() if "Error:" in line]
        return f"does not start: {(errors or ['?'])[-1].strip()[:120]}"
    truth = Reference(checkpoint, {name: path})
    expected = [truth.generate(name, prompt) for prompt in prompts]
    base = [truth.generate(None, prompt) for prompt in prompts]
    if answers == expected:
        return "equal to PEFT"
    same = sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True))
    ignored = ", equal to the base model" if answers == base else ""
    return f"wrong: {same} of {len(prompts)} answers equal to PEFT{ignored}"


async def ask(url: str, name: str, prompts: list[list[int]]) -> list[list[int]]:
    async with Client(url) as client:
        return [list((await client.generate(name, prompt)).token_ids) for prompt in prompts]


def main() -> None:
    kinds = [*peft_kinds.SERVED, *peft_kinds.REFUSED]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="outputs-") as made:
        folder = Path(made)
        checkpoint = make_checkpoint(folder / "base")
        for name, path in peft_kinds.make(checkpoint, folder, options.kinds).items():
            rows.append((name, outcome(checkpoint, name, path, folder)))
            print(*rows[-1], sep="  ", flush=True)
    print(plain_table(("adapter", "stock SGLang"), rows))


if __name__ == "__main__":
    main()
