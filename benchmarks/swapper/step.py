"""What the swapper takes of a scheduler iteration, against the number of cached nodes.

    python benchmarks/swapper/step.py [--nodes 1000 10000 100000] [--out FILE]

The server's own pool, tree, policy, host tier and swapper under steady pressure, without a model,
in the order of a scheduler iteration: requests arrive, often for adapters that are not there; a
step; the batch, for which the first waiting request whose adapter is there leaves the queue and its
KV takes room in the full pool; then what is done behind the batch's start. On a CPU the bytes of a
copy are moved by the step itself, where a GPU moves them beside it: here that is put off until the
step is over, and timed by itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/tree"))
os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()

from sglang_elora.bench.machine import machine  # noqa: E402
from swapper_world import LOOKAHEAD, World, uid  # noqa: E402

NUM_ADAPTERS = 256
RESIDENT = 64  # as many as the pool was sized for
ADAPTER_SLOTS = 128
NUM_LAYERS = 8  # an adapter is copied in as many pieces, as one of 32 layers is
LEAF_TOKENS = 16  # so that an adapter takes the room of 8 leaves
PROMPT_TOKENS = 12
SEED = 0


class Bench:
    """A full pool with about ``num_nodes`` nodes of KV in it."""

    def __init__(self, num_nodes: int, policy: str) -> None:
        self._rng = random.Random(SEED)
        slots = num_nodes * LEAF_TOKENS + RESIDENT * ADAPTER_SLOTS
        self.world = World(
            slots,
            num_adapters=NUM_ADAPTERS,
            adapter_slots=ADAPTER_SLOTS,
            policy=policy,
            num_layers=NUM_LAYERS,
        )
        self._conversations = 0
        self._put_off: list[Callable[[], None]] = []
        self._put_copies_off()
        for i in range(RESIDENT):
            self.world.arrive(uid(i), PROMPT_TOKENS)
            self.world.step()
            self._copy()
            self.world.waiting.clear()
        while self.world.cache.allocator.available_size() >= LEAF_TOKENS:
            self._cache_kv(uid(self._rng.randrange(RESIDENT)))

    def run(self, num_steps: int) -> dict[str, list[float]]:
        """Microseconds before a batch, behind its start, and of the copies that were started."""
        took: dict[str, list[float]] = {"step": [], "prepare": [], "copies": []}
        gc.collect()
        gc.freeze()
        for _ in range(num_steps):
            while len(self.world.waiting) < LOOKAHEAD:
                rank = min(int(self._rng.paretovariate(0.6)), NUM_ADAPTERS) - 1
                self.world.arrive(uid(rank), PROMPT_TOKENS)
            took["step"].append(_microseconds(self.world.step))
            took["copies"].append(_microseconds(self._copy))
            self._admit()
            took["prepare"].append(_microseconds(self.world.swapper.prepare))
        self.world.check()
        return took

    def counts(self) -> dict[str, int]:
        found = self.world.residency.statistics()
        names = ("adapter_loads", "adapter_evictions", "kv_slots_evicted")
        nodes = len(self.world.core._collect_all_nodes())
        return {"cached_nodes": nodes, **{name: found[name] for name in names}}

    def _put_copies_off(self) -> None:
        planes = self.world.residency.planes
        to_slots = planes._to_slots

        def put_off(*args: Any) -> None:
            self._put_off.append(lambda: to_slots(*args))

        object.__setattr__(planes, "_to_slots", put_off)

    def _copy(self) -> None:
        for copy in self._put_off:
            copy()
        self._put_off.clear()

    def _admit(self) -> None:
        waiting = self.world.waiting
        for i, req in enumerate(waiting):
            if self.world.is_resident(req.lora_id):
                del waiting[i]
                self._cache_kv(req.lora_id)
                return

    def _cache_kv(self, name: str) -> None:
        self._conversations += 1
        self.world.cache_kv(name, [self._conversations, *range(LEAF_TOKENS - 1)])


def _microseconds(call: Callable[[], None]) -> float:
    start_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start_ns) / 1e3


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--policies", nargs="+", default=["lru", "elora_paper", "elora"])
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = []
    for num_nodes in options.nodes:
        for policy in options.policies:
            bench = Bench(num_nodes, policy)
            took = bench.run(options.steps)
            row = "   ".join(
                f"{name} " + " ".join(f"{quantile(values, q):7.1f}" for q in (0.5, 0.99, 0.999))
                for name, values in took.items()
            )
            print(f"{num_nodes:>7} nodes  {policy:<12} us P50 P99 P99.9: {row}", flush=True)
            print(f"{'':15}{bench.counts()}", flush=True)
            runs.append({"nodes": num_nodes, "policy": policy, "us": took, **bench.counts()})
    if options.out is not None:
        facts = {**machine(), "seed": SEED, "waiting": LOOKAHEAD, "runs": runs}
        options.out.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
