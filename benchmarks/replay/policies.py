"""Policies on one cache tree, without a server: the seconds that each loses by its evictions.

    python -m benchmarks.replay.policies [--workloads chat translation agent] [--share 0.3]

The trace is replayed by its own times, each request by itself: cached prompt tokens are free, each
other token costs ``--recompute-us``, and an adapter that is not on the device costs ``--load-us``
per slot. Tree, policies and estimators are the server's own; queues, batches and a host tier for
KV are not modelled.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from sglang_elora.estimators import Popularity  # noqa: E402
from sglang_elora.policy import Costs, Policy, PolicyContext, Term, make_policy  # noqa: E402
from sglang_elora.tree import namespace_of  # noqa: E402
from sglang_elora.workloads import WORKLOADS, Session, Trace, make_trace  # noqa: E402
from tests.harness.radix_cache import Cache  # noqa: E402

ADAPTER_SLOTS = (170, 340, 680, 1360)  # ranks 8, 16, 32, 64 of an 8B model, a quarter each


@dataclass(frozen=True, slots=True)
class Outcome:
    lost_s: float  # per request
    hit_rate: float
    loads: int
    requests: int


class Replay:
    """Replay of one trace with one policy."""

    def __init__(self, name: str, costs: Costs, num_slots: int) -> None:
        name, _, told = name.partition("+")
        self.sessions_are_told = told == "sessions"
        self.cache = Cache("elora", num_slots)
        self.core: Any = self.cache.tree.tree_core
        self.costs = costs
        self.popularity = Popularity()
        self.batch = 8.0
        self.policy = self._make(name)
        self.core.use_policy(self.policy, num_slots)

    def _make(self, name: str) -> Policy:
        kind, _, argument = name.partition(":")
        context = PolicyContext(
            self.costs,
            needed_adapters=lambda: self.popularity.expected_distinct(self.batch),
            resident_adapters=lambda: self.core.adapter_table.num_resident,
            is_held=self.core.is_held,
        )
        options: dict[str, Any] = {}
        for option in filter(None, argument.split(",")):
            term, _, value = option.partition("=")
            if value:
                options["time_constant"] = float(value)
            else:
                options["off"] = options.get("off", frozenset()) | {Term(term)}
        return make_policy(kind, context, **options)

    def run(self, trace: Trace, warm_up: float = 0.2) -> Outcome:
        for adapter_id in {session.adapter for session in trace.sessions}:
            slots = adapter_slots(adapter_id)
            self.core.adapter_table.register(adapter_id, num_slots=slots, pinned=False, version="1")
        events: list[tuple[float, int, int]] = [(s.start_s, s.number, 0) for s in trace.sessions]
        heapq.heapify(events)
        lost = hits = prompts = loads = requests = 0.0
        while events:
            time_s, number, i = heapq.heappop(events)
            session = trace.sessions[number]
            loaded, hit, prompt = self._turn(session, i)
            if time_s >= warm_up * trace.duration_s:
                requests += 1
                hits, prompts = hits + hit, prompts + prompt
                loads += loaded > 0
                missed = prompt - hit
                lost += missed * self.costs.recompute + loaded * self.costs.load
            if i + 1 < len(session.turns):
                served_s = 0.2 + 0.02 * session.turns[i].num_output
                heapq.heappush(
                    events, (time_s + served_s + session.turns[i + 1].think_s, number, i + 1)
                )
        return Outcome(lost / requests, hits / prompts, int(loads), int(requests))

    def _turn(self, session: Session, i: int) -> tuple[int, int, int]:
        """(slots loaded, tokens found, tokens of the prompt)."""
        adapter_id = session.adapter
        adapter, loaded = self.core.adapter_table.get(adapter_id), 0
        self.popularity.use(adapter_id)
        if not adapter.resident:
            self._make_room(adapter.num_slots)
            self.core.place(adapter_id, self.cache.allocator.alloc(adapter.num_slots))
            loaded = adapter.num_slots
        tokens = list(session.system)
        for turn in session.turns[: i + 1]:
            tokens += turn.new_tokens
            if turn is not session.turns[i]:
                tokens += _answer(session, turn.num_output)
        namespace = namespace_of(adapter_id)
        match = self.cache.match(tokens, namespace)
        hit = match.device_prefix_len
        self.core.refresh_order()
        receipt = self.cache.lock(match.last_device_node)
        self.core.visit(match.last_device_node)
        whole = tokens + _answer(session, session.turns[i].num_output)
        self._make_room(len(whole))
        assert self.cache.insert(whole, namespace)
        self.cache.unlock(match.last_device_node, receipt)
        if self.sessions_are_told:
            self._tell(session, i, self.cache.match(whole, namespace).last_device_node)
        return loaded, hit, len(tokens)

    def _tell(self, session: Session, i: int, end: Any) -> None:
        """Report the session's turn to the tree, and its end after the last answer."""
        self.core.sessions.turn(str(session.number), self.core.node_by_id(end))
        if i + 1 == len(session.turns):
            self.core.sessions.over(str(session.number))

    def _make_room(self, num_slots: int) -> None:
        if (shortfall := num_slots - self.cache.allocator.available_size()) > 0:
            self.cache.evict(shortfall)


def _answer(session: Session, num_tokens: int) -> list[int]:
    """Token ids of an answer, which no other session's tokens equal."""
    return [10_000 + session.number] * num_tokens


def adapter_slots(name: str) -> int:
    return ADAPTER_SLOTS[int(name[1:]) % len(ADAPTER_SLOTS)]


def live_slots(trace: Trace) -> float:
    """Reference size for the pool, in slots: all used adapters, and the KV of live sessions."""
    names = {session.adapter for session in trace.sessions}
    return sum(map(adapter_slots, names)) + trace.mean_live_kv_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["lru", "gdsf", "elora_paper", "elora"],
        help="elora_paper:TERM,TERM,tau=T leaves out terms and sets the time constant; with "
        "+sessions requests name their session, and the last turn closes it",
    )
    parser.add_argument("--share", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=6.0)
    parser.add_argument("--duration", type=float, default=300.0)
    parser.add_argument("--recompute-us", type=float, default=40.0)
    parser.add_argument("--load-us", type=float, default=2.4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for workload in options.workloads:
        for share in options.share:
            for seed in range(options.runs):
                trace = make_trace(
                    WORKLOADS[workload],
                    turns_per_s=options.rate,
                    duration_s=options.duration,
                    seed=seed,
                )
                for name in options.policies:
                    costs = Costs(options.recompute_us * 1e-6, options.load_us * 1e-6, 0.0)
                    outcome = Replay(name, costs, int(share * live_slots(trace))).run(trace)
                    rows.append((workload, share, seed, name, outcome))
            for name in options.policies:
                mine = [r[4] for r in rows if r[:2] == (workload, share) and r[3] == name]
                base = [r[4] for r in rows if r[:2] == (workload, share) and r[3] == "lru"] or mine
                ratios = [m.lost_s / b.lost_s for m, b in zip(mine, base, strict=True)]
                print(
                    f"{workload:12} {share:4} {name:28} lost {1e3 * mine[0].lost_s:7.2f} ms"
                    f"  x lru {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
                    f"  hit {mine[0].hit_rate:.3f}  loads {mine[0].loads}/{mine[0].requests}",
                    flush=True,
                )
    if options.out is not None:
        content = [
            {
                "workload": k,
                "share": s,
                "seed": seed,
                "policy": n,
                **{f: getattr(o, f) for f in o.__slots__},
            }
            for k, s, seed, n, o in rows
        ]
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
