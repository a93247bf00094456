"""The simulated servers, by the names of the serving benchmark and some more.

``elora:POLICY`` and ``elora:POLICY-TERM,TERM`` (without these terms): one pool, a host tier, and
loads of adapters concurrent with batches. ``stock-default``: eight adapter slots, no host tier for
KV. ``stock-tuned:N``: N adapter slots and the host tier. Both stock sides have two LRUs, and loads
block the batch. ``slora``: one pool, adapters as in ``elora:lru``, no KV of ended requests (Sheng
et al., "S-LoRA", MLSys 2024). ``chameleon``: ``slora`` with another eviction order of adapters.
``clairvoyant``: ``elora`` with a policy that knows the trace. With ``elora:POLICY+sessions``
requests name their session, and the last one closes it; with ``+hints`` (or ``+sessions+hints``)
the client sends a hint one second before each turn but the first.
"""

from __future__ import annotations

from sglang_elora.estimators import OnlineCosts
from sglang_elora.policy import LRU, EloraPaper, Policy, PolicyContext, Term, make_policy
from sglang_elora.sim.cache import Cache
from sglang_elora.sim.calibration import Calibration
from sglang_elora.sim.chameleon import Chameleon
from sglang_elora.sim.clairvoyant import Clairvoyant
from sglang_elora.sim.engine import Engine
from sglang_elora.sim.link import Link
from sglang_elora.sim.residence import PoolResidence, SplitResidence
from sglang_elora.tree import AdapterTable
from sglang_elora.workloads import STOCK_DEFAULT_SLOTS


def make_engine(side: str, calibration: Calibration, adapters: list[str]) -> Engine:
    """The engine of a server with an empty cache.

    Args:
        adapters: Ids; adapter i has the i-th size of ``adapter_slots``, cyclically.

    Raises:
        ValueError: No such side, or a split that leaves no room for KV.
    """
    adapter_table = AdapterTable()
    for number, adapter_id in enumerate(adapters):
        slots = calibration.adapter_slots[number % len(calibration.adapter_slots)]
        adapter_table.register(adapter_id, num_slots=slots, pinned=False, version="")
    kind, _, argument = side.partition(":")
    if side == "stock-default":
        return _split(calibration, adapter_table, STOCK_DEFAULT_SLOTS, 0)
    if kind == "stock-tuned" and argument.isdigit():
        return _split(calibration, adapter_table, int(argument), calibration.host_slots)
    if side in ("slora", Chameleon.name):
        return _pool(
            calibration, adapter_table, LRU.name if side == "slora" else side, keeps_kv=False
        )
    if side == Clairvoyant.name or (kind == "elora" and argument):
        policy, *options = (argument or side).split("+")
        if set(options) <= {"sessions", "hints"}:
            return _pool(
                calibration,
                adapter_table,
                policy,
                names_sessions="sessions" in options,
                hints="hints" in options,
            )
    raise ValueError(
        f"side {side!r} must be stock-default, stock-tuned:SLOTS, elora:POLICY, slora, "
        "chameleon or clairvoyant"
    )


def kv_slots(calibration: Calibration, num_adapter_slots: int) -> int:
    """Slots that a static split leaves for KV; zero or negative if none."""
    return calibration.pool_slots - num_adapter_slots * calibration.split_slot


def _split(
    calibration: Calibration, adapter_table: AdapterTable, num_adapter_slots: int, host_slots: int
) -> Engine:
    pool_slots = kv_slots(calibration, num_adapter_slots)
    if pool_slots <= 0 or num_adapter_slots < 1:
        raise ValueError(f"{num_adapter_slots} adapter slots leave {pool_slots} slots for KV")
    costs, link = OnlineCosts(), Link(calibration)
    cache = Cache(LRU(costs.costs), adapter_table, pool_slots, host_slots)
    residence = SplitResidence(num_adapter_slots, calibration, link)
    return Engine(
        calibration,
        cache,
        residence,
        link,
        costs,
        kv_needs_adapter=False,
        touches_at_end=True,
    )


def _pool(
    calibration: Calibration,
    adapter_table: AdapterTable,
    policy: str,
    *,
    keeps_kv: bool = True,
    names_sessions: bool = False,
    hints: bool = False,
) -> Engine:
    costs, link = OnlineCosts(), Link(calibration)
    host_slots = calibration.host_slots if keeps_kv else 0
    held: list[Cache] = []  # filled below: the policy queries the cache, which needs the policy
    context = PolicyContext(
        costs.costs,
        needed_adapters=lambda: costs.needed_adapters,
        resident_adapters=lambda: adapter_table.num_resident,
        is_held=lambda adapter_id: held[0].holds(adapter_id),
        writes_back=host_slots > 0,
    )
    cache = Cache(_policy(policy, context), adapter_table, calibration.pool_slots, host_slots)
    held.append(cache)
    return Engine(
        calibration,
        cache,
        PoolResidence(cache, calibration, link, costs),
        link,
        costs,
        keeps_kv=keeps_kv,
        names_sessions=names_sessions,
        hints=hints,
    )


def _policy(name: str, context: PolicyContext) -> Policy:
    name, _, off = name.partition("-")
    terms = frozenset(map(Term, filter(None, off.split(","))))
    if terms and name != EloraPaper.name:
        raise ValueError(f"policy {name!r} has no terms to leave out")
    return make_policy(name, context, off=terms) if terms else make_policy(name, context)
