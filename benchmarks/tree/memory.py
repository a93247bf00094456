"""Resident memory per cached conversation: our tree with each policy, and SGLang's two cores.

    python -m benchmarks.tree.memory [--leaves 100000] [--out FILE]

Each tree is built in a process of its own; the memory before is subtracted. Half of the leaves are
cached before the first measurement, so that what does not grow with them cancels out.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]

from sglang_elora.bench.machine import machine

TREES = ("elora with policy elora", "elora with policy lru", "elora", "python", "rust")
"""``elora`` alone is our core without a policy, as it is in a server without LoRA."""


def bytes_per_leaf(tree: str, num_leaves: int, leaf_tokens: int) -> float:
    """Growth of the resident memory per leaf of ``leaf_tokens`` tokens."""
    from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

    ensure_torchvision_importable()
    from sglang_elora.policy import Costs, PolicyContext, make_policy
    from tests.harness.radix_cache import Cache

    core, _, policy = tree.partition(" with policy ")
    cache = Cache(core, num_leaves * leaf_tokens)
    if policy:
        context = PolicyContext(Costs(), is_held=lambda adapter_id: False, writes_back=True)
        cache.tree.tree_core.use_policy(make_policy(policy, context), num_leaves * leaf_tokens)

    def fill(first: int, last: int) -> int:
        for i in range(first, last):
            cache.insert([i, *range(leaf_tokens - 1)])
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    half = num_leaves // 2
    before = fill(0, half)
    return (fill(half, num_leaves) - before) / (num_leaves - half)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--leaves", type=int, default=100_000)
    parser.add_argument("--leaf-tokens", type=int, nargs="+", default=[8, 256])
    parser.add_argument("--out", type=Path, help="rows are appended")
    options = parser.parse_args()
    for leaf_tokens in options.leaf_tokens:
        for tree in TREES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(bytes_per_leaf, (tree, options.leaves, leaf_tokens))
            print(f"{tree}, {leaf_tokens} tokens: {found:.0f} bytes per leaf", flush=True)
            if options.out is not None:
                row = {**machine(), "tree": tree, "leaves": options.leaves}
                row |= {"leaf_tokens": leaf_tokens, "bytes_per_leaf": found}
                with options.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
