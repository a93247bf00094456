"""Time of the swapper and of admission per scheduler iteration, by the number of cached nodes.

    python -m benchmarks.swapper.step [--nodes 1000 10000 100000] [--waiting 2000]
        [--adapters 2000] [--gc server] [--out FILE]

The server's own pool, tree, policy, host tier, swapper and admission under steady pressure, without
a model, in the order of a scheduler iteration: requests arrive, often for adapters that are not on
the device; ``Swapper.step``; an admission pass, in which every waiting request is asked about and
the first admitted one leaves the queue; its KV takes room in the full pool; ``Swapper.prepare``.
Now and then an adapter is unloaded (``retire``) and another is loaded under a new id
(``register``).

On a CPU the step itself would move the bytes of a copy, which a GPU moves concurrently: here
that is deferred until after the step, and timed separately (``copies``).

Each call is timed by the wall clock and by the thread's processor time: on a shared machine, only
the latter is meaningful.

Garbage collection interrupts any call. ``--gc server`` leaves it as in SGLang: enabled, with
Python's thresholds, nothing frozen (SGLang freezes objects while it captures CUDA graphs, and
afterwards only when a client posts to ``/freeze_gc``, which is ``--gc frozen``). The processor
time of collections is recorded for each call; the tables show calls with and without it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from sglang_elora.bench.machine import machine  # noqa: E402
from tests.harness.swapper_world import Admission, SwapperWorld, adapter_id  # noqa: E402

RESIDENT = 64  # as many as the pool was sized for
ADAPTER_SLOTS = 128
NUM_LAYERS = 8  # an adapter is copied in as many pieces, as one of 32 layers is
LEAF_TOKENS = 16  # so that an adapter takes the room of 8 leaves
PROMPT_TOKENS = 12
MAX_ADAPTERS = 64  # in a batch
STEPS_PER_UNLOAD = 50
SEED = 0
CALLS = ("step", "admit", "prepare", "retire", "register", "copies")


class Clock:
    """Microseconds of each call, by its name: wall clock, processor, and processor for GC."""

    def __init__(self) -> None:
        self.us: dict[str, list[float]] = {name: [] for name in CALLS}
        self.cpu_us: dict[str, list[float]] = {name: [] for name in CALLS}
        self.gc_us: dict[str, list[float]] = {name: [] for name in CALLS}
        self._gc_ns = self._gc_started_ns = 0

    def time(self, name: str, call: Callable[[], Any]) -> None:
        gc_before_ns = self._gc_ns
        start_ns, cpu_start_ns = time.perf_counter_ns(), time.thread_time_ns()
        call()
        cpu_ns, took_ns = time.thread_time_ns() - cpu_start_ns, time.perf_counter_ns() - start_ns
        self.us[name].append(took_ns / 1e3)
        self.cpu_us[name].append(cpu_ns / 1e3)
        self.gc_us[name].append((self._gc_ns - gc_before_ns) / 1e3)

    def on_gc(self, phase: str, _: dict[str, int]) -> None:
        """For ``gc.callbacks``."""
        if phase == "start":
            self._gc_started_ns = time.thread_time_ns()
        else:
            self._gc_ns += time.thread_time_ns() - self._gc_started_ns

    def without_gc(self, name: str) -> list[float]:
        """Processor time."""
        return [us - gc for us, gc in zip(self.cpu_us[name], self.gc_us[name], strict=True)]


class Bench:
    """A full pool with about ``num_nodes`` nodes of KV in it."""

    def __init__(self, num_nodes: int, policy: str, num_adapters: int, num_waiting: int) -> None:
        self._rng = random.Random(SEED)
        self._num_waiting = num_waiting
        slots = num_nodes * LEAF_TOKENS + RESIDENT * ADAPTER_SLOTS
        self.world = SwapperWorld(
            slots,
            num_adapters=num_adapters,
            adapter_slots=ADAPTER_SLOTS,
            policy=policy,
            num_layers=NUM_LAYERS,
        )
        self._names = [adapter_id(i) for i in range(num_adapters)]
        self._num_loaded = num_adapters
        self.admission = Admission(self.world.residency, self.world.swapper, MAX_ADAPTERS)
        self._conversations = 0
        self._put_off: list[Callable[[], None]] = []
        self._put_copies_off()
        for i in range(RESIDENT):
            self.world.arrive(adapter_id(i), PROMPT_TOKENS)
            self.world.step()
            self._copy()
            self.world.waiting.clear()
        while self.world.cache.allocator.available_size() >= LEAF_TOKENS:
            self._cache_kv(adapter_id(self._rng.randrange(RESIDENT)))

    def run(self, num_steps: int, gc_mode: str, clock: Clock) -> None:
        """Run ``num_steps`` scheduler iterations; ``clock`` times each call."""
        world = self.world
        gc.collect()
        if gc_mode == "frozen":
            gc.freeze()
        elif gc_mode == "off":
            gc.disable()
        gc.callbacks.append(clock.on_gc)
        for number in range(num_steps):
            self._arrive()
            clock.time("step", world.step)
            clock.time("copies", self._copy)
            admitted: list[Any] = []
            clock.time("admit", lambda found=admitted: found.extend(self._ask_all()))
            if admitted:
                self._take(admitted[0])
            clock.time("prepare", world.swapper.prepare)
            if number % STEPS_PER_UNLOAD == 0:
                self._replace_adapter(clock)
        gc.callbacks.remove(clock.on_gc)
        gc.enable()
        gc.unfreeze()
        world.check()

    def counts(self) -> dict[str, int]:
        found = self.world.residency.statistics()
        names = ("adapter_loads", "adapter_evictions", "kv_slots_evicted")
        nodes = len(self.world.core._collect_all_nodes())
        return {"cached_nodes": nodes, **{name: found[name] for name in names}}

    def _arrive(self) -> None:
        while len(self.world.waiting) < self._num_waiting:
            rank = min(int(self._rng.paretovariate(0.6)), len(self._names)) - 1
            self.world.arrive(self._names[rank], PROMPT_TOKENS).rid = ""

    def _ask_all(self) -> list[Any]:
        """The requests that one pass of SGLang's over the queue finds admissible."""
        adder: Any = SimpleNamespace(
            can_run_list=[],
            running_batch=SimpleNamespace(is_empty=lambda: False),
            rem_chunk_tokens=None,
            log_input_tokens=0,
        )
        self.admission.begin_pass(adder)
        return [req for req in self.world.waiting if self.admission.admit(req, set())]

    def _take(self, req: Any) -> None:
        """Remove an admitted request from the queue, and cache its KV."""
        self.world.waiting.remove(req)
        node = self.world.core.node_of(req.lora_id)
        req.retracted_stain, req.prefix_len, req.last_node = False, 0, node.id
        req.materialized_host_hit_len = lambda: 0
        self.admission.taken(req)
        self._cache_kv(req.lora_id)

    def _replace_adapter(self, clock: Clock) -> None:
        """Unload an adapter that no request waits for, and load one with a new id in its place."""
        wanted = {req.lora_id for req in self.world.waiting}
        free = [i for i, name in enumerate(self._names) if name not in wanted]
        if not free:
            return
        i, new = self._rng.choice(free), adapter_id(self._num_loaded)
        clock.time("retire", lambda: self.world.residency.retire(self._names[i]))
        clock.time("register", lambda: self.world.load(new))
        self._names[i] = new
        self._num_loaded += 1

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

    def _cache_kv(self, name: str) -> None:
        self._conversations += 1
        self.world.cache_kv(name, [self._conversations, *range(LEAF_TOKENS - 1)])


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


QUANTILES = {"P50": 0.5, "P99": 0.99, "P99.9": 0.999, "max": 1.0}


def table(clock: Clock) -> str:
    """Quantiles of each call in microseconds: wall clock, processor, processor without GC."""
    heads = "".join(f"{kind + ' ' + q:>10}" for kind in ("wall", "cpu", "-gc") for q in QUANTILES)
    lines = [f"{'us':9}{heads}"]
    for name in CALLS:
        kinds = (clock.us[name], clock.cpu_us[name], clock.without_gc(name))
        if clock.us[name]:
            figures = [quantile(values, q) for values in kinds for q in QUANTILES.values()]
            lines.append(f"{name:9}" + "".join(f"{figure:10.1f}" for figure in figures))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--policies", nargs="+", default=["lru", "elora_paper", "elora"])
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--waiting", type=int, default=2_000, help="requests in the queue")
    parser.add_argument("--adapters", type=int, default=2_000, help="registered")
    parser.add_argument("--gc", choices=["server", "frozen", "off"], default="server")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = []
    for num_nodes in options.nodes:
        for policy in options.policies:
            bench = Bench(num_nodes, policy, options.adapters, options.waiting)
            bench.run(options.steps, options.gc, clock := Clock())
            print(f"{num_nodes} nodes, {policy}, {bench.counts()}\n{table(clock)}\n", flush=True)
            samples = {"us": clock.us, "cpu_us": clock.cpu_us, "gc_us": clock.gc_us}
            runs.append({"nodes": num_nodes, "policy": policy, **samples, **bench.counts()})
    if options.out is not None:
        load = {"waiting": options.waiting, "adapters": options.adapters, "gc": options.gc}
        facts = {**machine(), "seed": SEED, **load, "runs": runs}
        options.out.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
