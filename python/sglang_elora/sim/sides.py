"""The simulated servers, by the names of the serving benchmark and some more.

``elora:POLICY`` and ``elora:POLICY-TERM,TERM`` (without these terms): one pool, a host tier, and
loads of adapters concurrent with batches. ``stock-default``: eight adapter slots, no host tier for
KV. ``stock-tuned:N``: N adapter slots and the host tier. Both stock sides have two LRUs, and loads
block the batch; with ``stock-tuned:N+overlap`` they start for waiting requests and do not.
``slora``: one pool, adapters as in ``elora:lru``, no KV of ended requests (Sheng et al., "S-LoRA",
MLSys 2024). ``chameleon``: ``slora`` with another eviction order of adapters. With
``elora:POLICY+sessions`` requests name their session, and the last one closes it; with ``+hints``
(or ``+sessions+hints``) the client sends a hint one second before each turn but the first. With
``+activated`` the adapters that check a conversation are activated LoRAs.

Yardsticks: ``clairvoyant`` is ``elora`` with a policy that knows the trace; ``clairvoyant:PART``
knows the next uses of one part (``host``, ``device``, ``adapters``) and ranks the rest as
``elora``; ``clairvoyant+hints`` also has each turn, the first included, announced one second ahead.
``unlimited`` is ``elora:lru`` with a pool in which everything fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sglang_elora.estimators import OnlineCosts
from sglang_elora.policy import LRU, EloraPaper, Policy, PolicyContext, Term, make_policy
from sglang_elora.sim.cache import Cache
from sglang_elora.sim.calibration import Calibration
from sglang_elora.sim.chameleon import Chameleon
from sglang_elora.sim.clairvoyant import Clairvoyant
from sglang_elora.sim.engine import Engine
from sglang_elora.sim.link import Link
from sglang_elora.sim.oracle import Oracle, Part
from sglang_elora.sim.residence import OverlapResidence, PoolResidence, SplitResidence
from sglang_elora.tree import AdapterTable
from sglang_elora.workloads import STOCK_DEFAULT_SLOTS

UNLIMITED = "unlimited"
OVERLAP = "overlap"
_UNLIMITED_SLOTS = 10**9
"""Pool slots of ``unlimited``: more than any trace fills."""


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
    count, _, option = argument.partition("+")
    if kind == "stock-tuned" and count.isdigit() and option in ("", OVERLAP):
        return _split(calibration, adapter_table, int(count), calibration.host_slots, option)
    if side in ("slora", Chameleon.name):
        return _pool(
            calibration, adapter_table, LRU.name if side == "slora" else side, keeps_kv=False
        )
    if side == UNLIMITED:
        return _pool(replace(calibration, pool_slots=_UNLIMITED_SLOTS), adapter_table, LRU.name)
    if kind == Clairvoyant.name and argument in {*Part}:
        return _pool(calibration, adapter_table, Oracle.name, part=Part(argument))
    if side == f"{Clairvoyant.name}+hints":
        return _pool(calibration, adapter_table, Clairvoyant.name, names_sessions=True, hints=True)
    if side == Clairvoyant.name or (kind == "elora" and argument):
        policy, *options = (argument or side).split("+")
        if set(options) <= {"sessions", "hints", "activated"}:
            return _pool(
                calibration,
                adapter_table,
                policy,
                names_sessions="sessions" in options,
                hints="hints" in options,
                activated="activated" in options,
            )
    raise ValueError(
        f"side {side!r} must be stock-default, stock-tuned:SLOTS[+overlap], elora:POLICY, slora, "
        "chameleon, clairvoyant, clairvoyant:host, clairvoyant:device, clairvoyant:adapters, "
        "clairvoyant+hints or unlimited"
    )


def kv_slots(calibration: Calibration, num_adapter_slots: int) -> int:
    """Slots that a static split leaves for KV; zero or negative if none."""
    return calibration.pool_slots - num_adapter_slots * calibration.split_slot


def _split(
    calibration: Calibration,
    adapter_table: AdapterTable,
    num_adapter_slots: int,
    host_slots: int,
    option: str = "",
) -> Engine:
    pool_slots = kv_slots(calibration, num_adapter_slots)
    if pool_slots <= 0 or num_adapter_slots < 1:
        raise ValueError(f"{num_adapter_slots} adapter slots leave {pool_slots} slots for KV")
    costs, link = OnlineCosts(), Link(calibration)
    cache = Cache(LRU(costs.costs), adapter_table, pool_slots, host_slots)
    kind = OverlapResidence if option == OVERLAP else SplitResidence
    residence = kind(num_adapter_slots, calibration, link)
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
    activated: bool = False,
    **options: Any,
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
    cache = Cache(
        _policy(policy, context, options), adapter_table, calibration.pool_slots, host_slots
    )
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
        activated=activated,
    )


def _policy(name: str, context: PolicyContext, options: Mapping[str, Any]) -> Policy:
    name, _, off = name.partition("-")
    terms = frozenset(map(Term, filter(None, off.split(","))))
    if terms and name != EloraPaper.name:
        raise ValueError(f"policy {name!r} has no terms to leave out")
    return make_policy(name, context, **options, **({"off": terms} if terms else {}))
