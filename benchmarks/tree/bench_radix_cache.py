"""Cost of the radix cache's operations against the number of cached conversations.

    python -m benchmarks.tree.bench_radix_cache [--leaves 1000 10000 100000] [--out FILE]

Our tree core and both of SGLang's hold the same conversations and alternate in each operation, so
that changes of the machine's speed affect all three. Times are microseconds per call; the pool is
full, as in a busy server, and evicted entries are cached again before the next eviction. Raw
samples are written to the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from sglang_elora.bench.machine import machine  # noqa: E402
from tests.harness.radix_cache import Cache  # noqa: E402

CORES = ("elora", "python", "rust")
EVICT_TOKENS = 1000
SEED = 0
Samples = dict[str, dict[str, list[float]]]  # operation -> core -> microseconds


class Bench:
    """All cores with ``num_leaves`` conversations of ``leaf_tokens`` tokens each."""

    def __init__(self, num_leaves: int, leaf_tokens: int) -> None:
        self._rng = random.Random(SEED)
        self._tokens = leaf_tokens
        self._next = num_leaves
        slots = (num_leaves + EVICT_TOKENS // leaf_tokens + 4) * leaf_tokens
        self.caches = {core: Cache(core, slots) for core in CORES}
        for cache in self.caches.values():
            for i in range(num_leaves):
                cache.insert(self._conversation(i))

    def run(self, rounds: int) -> Samples:
        samples: Samples = {
            name: {core: [] for core in CORES} for name in ("match", "insert", "lock", "evict")
        }
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            known = self._conversation(self._rng.randint(self._next // 2, self._next - 1))
            fresh = self._conversation(self._next)
            cores = self._rng.sample(CORES, len(CORES))
            for core in cores:
                cache = self.caches[core]
                node = timed(samples["match"][core], cache.match, known).last_device_node
                timed(samples["lock"][core], lock_and_unlock, cache, node)
            for core in cores:
                timed(samples["insert"][core], self.caches[core].insert, fresh)
            freed = {
                timed(samples["evict"][core], self.caches[core].evict, EVICT_TOKENS)
                for core in cores
            }
            assert len(freed) == 1, "the cores did not evict the same"
            self._next += 1
            for _ in range(freed.pop() // self._tokens - 1):
                for cache in self.caches.values():
                    cache.insert(self._conversation(self._next))
                self._next += 1
        samples["evict adapter"] = {"elora": self._evict_adapter(rounds)}
        gc.enable()
        return samples

    def _evict_adapter(self, rounds: int) -> list[float]:
        """Times of evicting an adapter of 1,000 slots; SGLang's caches hold no adapters."""
        cache = self.caches["elora"]
        core = cache.tree.tree_core
        core.adapter_table.register("adapter", num_slots=EVICT_TOKENS, pinned=False, version="")
        took_us: list[float] = []
        for _ in range(rounds):
            cache.evict(max(0, EVICT_TOKENS - cache.allocator.available_size()))
            core.place("adapter", cache.allocator.alloc(EVICT_TOKENS))
            node_id = core.node_of("adapter").id
            timed(took_us, cache.tree._evict_device_leaf, node_id, defaultdict(int))
        return took_us

    def _conversation(self, i: int) -> list[int]:
        return [i, *range(self._tokens - 1)]


def lock_and_unlock(cache: Cache, node: Any) -> None:
    cache.unlock(node, cache.lock(node))


def timed(took_us: list[float], call: Callable[..., Any], *args: Any) -> Any:
    start = time.perf_counter_ns()
    result = call(*args)
    took_us.append((time.perf_counter_ns() - start) / 1e3)
    return result


def report(num_leaves: int, samples: Samples) -> None:
    for name, by_core in samples.items():
        medians = {core: statistics.median(values) for core, values in by_core.items()}
        ratios = [
            statistics.median(
                other / ours for ours, other in zip(by_core["elora"], by_core[core], strict=True)
            )
            for core in CORES[1:]
            if core in by_core
        ]
        row = "  ".join(f"{core} {median:9.1f}" for core, median in medians.items())
        if ratios:
            row += f"   times slower than ours: python {ratios[0]:.2f}, rust {ratios[1]:.2f}"
        print(f"{num_leaves:>7} leaves  {name:<13} {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--leaf-tokens", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = []
    for leaf_tokens in options.leaf_tokens:
        print(f"conversations of {leaf_tokens} tokens, microseconds, medians:")
        for num_leaves in options.leaves:
            samples = Bench(num_leaves, leaf_tokens).run(options.rounds)
            report(num_leaves, samples)
            runs.append({"leaves": num_leaves, "leaf_tokens": leaf_tokens, "us": samples})
    if options.out is not None:
        facts = {**machine(), "seed": SEED, "evict_tokens": EVICT_TOKENS, "runs": runs}
        options.out.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
