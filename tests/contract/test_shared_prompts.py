"""Requests with activated LoRAs that are sent together compute the prompt that they share once."""

from __future__ import annotations

import gc
import weakref
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sglang_elora.tree import ActivatedAdapter, ActivatedNamespace, base_namespace, namespace_of
from tests.harness.adapter_cache import AdapterCache

pytestmark = pytest.mark.filterwarnings("ignore")  # those of what SGLang imports

NAMES = ("a", "b", "c", "d")
SAID = tuple(range(100, 300))


class Server:
    """The tree, and admission of prompts to it, as SGLang's scheduler does it."""

    def __init__(self, page_size: int = 1) -> None:
        from sglang_elora.srt.scheduler.shared_prompts import SharedPrompts

        self.cache = AdapterCache(4000, page_size=page_size)
        self.cache.core.full.lock_adapters()
        for name in NAMES:
            self.cache.add(name, 16)
            assert self.cache.load(name)
        self.page_size = page_size
        self.shared = SharedPrompts(self.cache.core)

    def request(
        self,
        name: str | None,
        tokens: Sequence[int],
        start: int | None = None,
        extra: str = "",
        salt: str | None = None,
    ) -> Any:
        """A request; with ``start`` its adapter acts from this token on."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        lora_id, namespace = name, base_namespace(extra)
        if name is not None and start is None:
            namespace = namespace_of(name, extra)
        elif name is not None and start is not None:
            namespace = ActivatedNamespace.of(name, extra, namespace, start, self.page_size)
            lora_id = ActivatedAdapter.of(name, start)
        req = Req("rid", "", array("q", tokens), SamplingParams(), cache_salt=salt)
        req.lora_id, req.extra_key = lora_id, namespace
        return req

    def begin_pass(self) -> None:
        self.shared.begin_pass()

    def admit(self, req: Any, num_tokens: int | None = None) -> bool:
        """Take the request into the batch, with slots for its prompt or a chunk of it, unless it
        should wait."""
        if self.shared.waits(req):
            return False
        tree = self.cache.tree
        req.init_next_round_input(tree)
        self.shared.taken(req)
        req.lock = tree.lock(req.last_node)
        req.kv.req_pool_idx = self.cache.rows.free_slots.pop()
        held = tree.prefix_device_indices(req)
        self.row(req)[: len(held)] = held.to(torch.int32)
        req.kv.kv_allocated_len = len(held)
        self.compute(req, num_tokens)
        return True

    def row(self, req: Any) -> Any:
        return self.cache.rows.req_to_token[req.kv.req_pool_idx]

    def compute(self, req: Any, num_tokens: int | None = None) -> None:
        begin = int(req.kv.kv_allocated_len)
        end = len(req.origin_input_ids) if num_tokens is None else begin + num_tokens
        num_pages = -(-(end - begin) // self.page_size)
        slots = self.cache.allocator.alloc(num_pages * self.page_size)[: end - begin]
        self.row(req)[begin:end] = slots.to(torch.int32)
        req.kv.kv_allocated_len = end

    def insert(self, req: Any) -> None:
        """What is computed of the prompt gets into the tree."""
        req.refresh_fill_ids()
        self.cache.tree.checkpoint(req, up_to=int(req.kv.kv_allocated_len))
        req.prefix_len = int(req.kv.kv_allocated_len)

    def answer(self, req: Any) -> None:
        """The first token is there, and with it the KV of the prompt in the tree."""
        self.insert(req)
        req.output_ids = array("q", [7])


def ask(server: Server, name: str, said: Sequence[int] = SAID, **options: Any) -> Any:
    return server.request(name, [*said, 1, ord(name), 3], len(said), **options)


@pytest.mark.parametrize("page_size", [1, 16])
def test_first_request_computes_the_prompt_for_all(page_size: int) -> None:
    server = Server(page_size)
    requests = [ask(server, name) for name in NAMES]
    server.begin_pass()
    assert [server.admit(req) for req in requests] == [True, False, False, False]
    server.begin_pass()  # SGLang's overlapped schedule: the result is not processed yet
    assert not any(server.admit(req) for req in requests[1:])
    server.answer(requests[0])
    server.begin_pass()
    assert all(server.admit(req) for req in requests[1:])
    whole_pages = len(SAID) // page_size * page_size
    assert {req.prefix_len for req in requests[1:]} == {whole_pages}
    assert server.cache.core.counts.requests_waited_for_prompt == 3


def test_request_of_the_base_model_computes_it_for_adapters() -> None:
    server = Server()
    draft, check = server.request(None, [*SAID, 5, 6]), ask(server, "a")
    server.begin_pass()
    assert [server.admit(draft), server.admit(check)] == [True, False]
    server.answer(draft)
    server.begin_pass()
    assert server.admit(check) and check.prefix_len == len(SAID)


def test_request_waits_for_all_chunks_of_the_prompt() -> None:
    server = Server()
    first, second, third = (ask(server, name) for name in NAMES[:3])
    server.begin_pass()
    assert server.admit(first, num_tokens=50) and not server.admit(second)
    server.insert(first)
    server.begin_pass()
    assert not server.admit(second) and not server.admit(third)  # also one that came meanwhile
    server.compute(first)
    server.answer(first)
    server.begin_pass()
    assert server.admit(second) and server.admit(third)
    assert second.prefix_len == third.prefix_len == len(SAID)


@pytest.mark.parametrize("ending", ["aborted", "retracted"])
def test_request_waits_no_longer_for_one_that_ended_without_kv(ending: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    server = Server()
    first, second, third = (ask(server, name) for name in NAMES[:3])
    server.begin_pass()
    assert server.admit(first) and not server.admit(second)
    if ending == "aborted":
        first.finished_reason = FINISH_ABORT()
    else:
        first.kv.req_pool_idx = None
    server.begin_pass()
    assert server.admit(second) and not server.admit(third), "the next one computes it"


def test_requests_that_share_little_do_not_wait() -> None:
    server = Server()
    beginning = SAID[:80]
    others = [
        ask(server, "b", [*beginning, *range(400, 600)]),  # a system prompt, then another chat
        ask(server, "b", SAID[:40]),  # computed in no time
        ask(server, "b", extra="tenant"),
        ask(server, "b", salt="secret"),
        server.request("b", SAID),  # a plain LoRA, whose KV is its own
        server.request(None, SAID),  # batched as in SGLang
        server.request("b", [*SAID[:70], *range(600)], 70),  # most of it is the adapter's
    ]
    server.begin_pass()
    assert server.admit(ask(server, "a"))
    assert all(server.admit(req) for req in others)
    assert server.cache.core.counts.requests_waited_for_prompt == 0


def test_request_waits_for_the_rest_of_a_conversation_that_is_cached_in_part() -> None:
    server = Server()
    earlier = server.request(None, SAID)
    server.begin_pass()
    assert server.admit(earlier)
    server.answer(earlier)
    longer = [*SAID, *range(400, 500)]
    first, second = ask(server, "a", longer), ask(server, "b", longer)
    little = ask(server, "c", [*SAID, 400, 401])
    server.begin_pass()
    assert [server.admit(req) for req in (first, second, little)] == [True, False, True]
    assert first.prefix_len == len(SAID)


def test_ended_requests_are_forgotten() -> None:
    server = Server()
    first, second = ask(server, "a"), ask(server, "b")
    server.begin_pass()
    assert server.admit(first) and not server.admit(second)
    server.answer(first)
    server.begin_pass()
    assert server.admit(second)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
