"""Ablations of ELORA, each a plugin for a measured server that changes one thing.

``blocking``: a copy of an adapter blocks the scheduler until it is complete, as loads without a
swapper do. ``free``: such copies take no time on the emulated link; the difference between the two
bounds the cost of loads. ``branch``: an adapter is evicted with all of its KV, even if other
entries have a lower rank (the paper's "whole-branch" case). ``late``: KV is copied to the host when
it is evicted, not in advance. ``timed``: unchanged, with times of events written to a file;
``timed_without_hints``: the same without hints. ``switched``: with hints, without, or with far too
many, as a file says. ``without_...``: the policy elora_paper without one of its terms;
``without_dependency``: adapters are evicted before their KV, which stays on the device without
them.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_COPY_STREAM = "sglang_elora.srt.mem_cache.copy_stream"


def without_adapter_count() -> None:
    _without("ADAPTER_COUNT")


def without_swap_cost() -> None:
    _without("SWAP_COST")


def without_visit_frequency() -> None:
    _without("VISIT_FREQUENCY")


def without_recency() -> None:
    _without("RECENCY")


def without_dependency() -> None:
    def is_leaf(original: Callable[..., bool], self: Any, node: Any) -> bool:
        from sglang_elora.srt.mem_cache.adapter_node import FULL, AdapterNode

        if not isinstance(node, AdapterNode):
            return original(self, node)
        return node.component_data[FULL].lock_ref == 0 and len(node.slots) > 0

    core = "sglang_elora.srt.mem_cache.tree_core.EloraTreeCore"
    _hook(f"{core}._is_device_leaf", is_leaf, "AROUND")


def _without(name: str) -> None:
    def make(original: Callable[..., None], *arguments: Any) -> None:
        from sglang_elora.policy import Term

        original(*arguments, off=frozenset({Term[name]}))

    _hook("sglang_elora.policy.elora_paper.EloraPaper.__init__", make, "AROUND")


def blocking() -> None:
    def wait_at_once(started: Any, *_: Any) -> Any:
        copy, _paged = started
        copy.synchronize()
        return started

    _hook(f"{_COPY_STREAM}.CopyStream.start", wait_at_once, "AFTER")


def free() -> None:
    _hook(f"{_COPY_STREAM}.delay_page_copy", lambda num_bytes: None, "REPLACE")


def late() -> None:
    _hook("sglang_elora.swapper.planner.Planner._copy_ahead", lambda self: False, "REPLACE")


def timed() -> None:
    """Moments of each adapter to the file ``MOMENTS``: its request arrived, was received by the
    scheduler and taken into a batch, and its copy began."""
    out = open(os.environ["MOMENTS"], "a", buffering=1)

    def note(what: str, adapter_id: str) -> None:
        out.write(f"{what} {adapter_id} {time.monotonic()}\n")

    def arrived(self: Any, names: Any, *_: Any) -> None:
        if isinstance(names, str) and (ref := self._ref(names)) is not None:
            note("arrived", ref.lora_id)

    def received(self: Any, req: Any, *_: Any, **__: Any) -> None:
        if req.lora_id is not None:
            note("received", req.lora_id)

    _hook(
        "sglang_elora.srt.tokenizer.tokenizer_control.TokenizerControl.announce", arrived, "BEFORE"
    )
    _hook("sglang.srt.managers.scheduler.Scheduler.handle_generate_request", received, "BEFORE")
    _hook(
        f"{_COPY_STREAM}.CopyStream.start",
        lambda self, adapter_id, *_: note("copied", adapter_id),
        "BEFORE",
    )
    _hook(
        "sglang_elora.srt.scheduler.swapper.Swapper.used",
        lambda self, adapter_id: note("taken", adapter_id),
        "BEFORE",
    )


def timed_without_hints() -> None:
    timed()
    _hook(
        "sglang_elora.control.hint_limiter.HintLimiter.admit", lambda self, adapters: [], "REPLACE"
    )


HINTS_PER_S = 10_000
UNKNOWN_SHARE = 0.05


def switched() -> None:
    """What the file ``MODE`` says of adapters of requests while the server runs: they are not
    announced (``off``); they are (``on``); and while a request is there others are as well, 10,000
    per second (``flood``). ``idle`` is ``flood`` without doing anything with these."""
    mode = "on"

    def read() -> str:
        return Path(os.environ["MODE"]).read_text()

    def announce(original: Callable[..., Any], self: Any, *arguments: Any) -> None:
        if mode != "off":
            original(self, *arguments)

    async def flood(manager: Any) -> None:
        nonlocal mode
        loaded = [*manager.elora.loaded()]
        names = loaded + [f"nobody-{i}" for i in range(round(UNKNOWN_SHARE * len(loaded)))]
        num_announced, last_s = 0, time.monotonic()
        while True:
            mode = read()
            for _ in range(50):
                await asyncio.sleep(0.001 if mode in ("idle", "flood") else 0.02)
                now_s = time.monotonic()
                due, last_s = round(min(now_s - last_s, 0.1) * HINTS_PER_S), now_s
                if not manager.rid_to_state:
                    break
                if mode == "flood":
                    for _ in range(due):
                        num_announced += 1
                        manager.elora.announce(names[num_announced % len(names)])

    def begin(result: None, self: Any) -> None:
        if not hasattr(self, "flood"):
            self.flood = asyncio.get_running_loop().create_task(flood(self))

    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    _hook(f"{manager}.auto_create_handle_loop", begin, "AFTER")
    control = "sglang_elora.srt.tokenizer.tokenizer_control.TokenizerControl"
    _hook(f"{control}.announce", announce, "AROUND")


def branch() -> None:
    def start(result: None, self: Any, num_tokens: int) -> None:
        self._victims = _Branches(self, self._victims, num_tokens)

    def take(original: Callable[..., Any], self: Any, tracker: Any, *frees: Any) -> Any:
        self._victims.tracker = tracker
        return original(self, tracker, *frees)

    component = "sglang_elora.srt.mem_cache.full_component.EloraFullComponent"
    _hook(f"{component}._evict_device_start", start, "AFTER")
    _hook(f"{component}._evict_device_next_node", take, "AROUND")


class _Branches:
    """Victims of one eviction; each first leaf is followed by the rest of its adapter's branch."""

    def __init__(self, component: Any, victims: Any, num_tokens: int) -> None:
        self._component, self._victims, self._num_tokens = component, victims, num_tokens
        self._open: str | None = None  # the adapter whose branch is being evicted
        self.tracker: Any = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._victims, name)

    def next(self) -> Any:
        component = self._component
        if self._open is not None:
            leaf = _leaf_under(component.tree_core, self._open)
            if leaf is not None:
                return leaf
            self._open, component._tokens_wanted = None, self._num_tokens
            if self.tracker[component.component_type] >= self._num_tokens:
                return None
        leaf = self._victims.next()
        if leaf is not None and leaf.entry.group is not None and not leaf.entry.is_adapter:
            self._open, component._tokens_wanted = leaf.entry.group, sys.maxsize
        return leaf


def _leaf_under(core: Any, adapter_id: str) -> Any:
    """Next evictable leaf of the adapter's branch, the adapter itself last, or None."""
    nodes = [core.node_of(adapter_id)]
    for node in nodes:  # grows while it is read
        nodes += node.children.values()
    return next((n for n in reversed(nodes) if n in core.evictable_device_leaves), None)


def _hook(target: str, body: Callable[..., Any], kind: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, body, HookType[kind])
