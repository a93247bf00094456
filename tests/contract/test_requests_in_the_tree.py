"""SGLang's own calls insert a request's KV into the tree and evict for its allocations."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from sglang_elora.policy import SessionState
from sglang_elora.tree import namespace_of
from tests.harness.adapter_cache import AdapterCache
from tests.harness.radix_cache import Cache

pytestmark = pytest.mark.filterwarnings("ignore")  # those of what SGLang imports

PROMPT, ANSWER = list(range(10)), list(range(100, 106))


@pytest.fixture
def cache() -> Iterator[AdapterCache]:
    from sglang_elora.policy import Elora
    from sglang_elora.srt.measured_costs import MeasuredCosts

    made = AdapterCache()
    made.core.use_policy(Elora(MeasuredCosts(made.tree).costs, made.core.is_held), 400)
    for adapter_id in ("a", "b"):
        made.add(adapter_id, 30)
        assert made.load(adapter_id)
    yield made
    made.check()


class Request:
    """SGLang's ``Req`` with a row of slots, as its scheduler handles it."""

    def __init__(
        self,
        cache: AdapterCache,
        adapter_id: str,
        session: str | None = None,
        tokens: Sequence[int] = PROMPT,
    ) -> None:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        self.cache, self.tree = cache, cache.tree
        prompt = array("q", tokens)
        self.req = Req("rid", "", prompt, SamplingParams(), extra_key=namespace_of(adapter_id))
        self.req.session_id = session
        self.req.init_next_round_input(self.tree)
        self.req.lock = self.tree.lock(self.req.last_node)
        self.req.kv.req_pool_idx = cache.rows.free_slots.pop()
        self.row = cache.rows.req_to_token[self.req.kv.req_pool_idx]
        held = self.tree.prefix_device_indices(self.req)
        self.row[: len(held)] = held.to(torch.int32)
        self._compute(len(tokens) - len(held))

    def _compute(self, num_tokens: int) -> None:
        first = int(self.req.kv.kv_allocated_len) or self.req.prefix_len
        slots = self.cache.allocator.alloc(num_tokens)
        self.row[first : first + num_tokens] = slots.to(torch.int32)
        self.req.kv.kv_allocated_len = first + num_tokens

    def checkpoint(self) -> None:
        self.req.refresh_fill_ids()
        self.tree.checkpoint(self.req, up_to=self.req.kv.kv_allocated_len)

    def answer(self, tokens: Sequence[int] = ANSWER) -> None:
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH

        self.req.output_ids = array("q", tokens)
        self._compute(len(tokens))
        self.req.finished_reason = FINISH_LENGTH(len(tokens))
        self.checkpoint()
        self.tree.unlock(self.req.lock)
        self.cache.rows.free_slots.append(self.req.kv.req_pool_idx)

    @property
    def slots(self) -> list[int]:
        slots: list[int] = self.row[: self.req.kv.kv_allocated_len].tolist()
        return slots


def test_request_row_holds_no_adapter_slots(cache: AdapterCache) -> None:
    """Adapter slots are on the request's path; in its row, attention would read them as KV."""
    adapter = set(cache.core.node_of("a").slots.tolist())
    request = Request(cache, "a")
    for step in (request.checkpoint, request.answer):
        step()
        path = cache.tree.path_device_indices(request.req.last_node).tolist()
        assert path == request.slots
        assert not adapter & set(path)
    again = Request(cache, "a")
    assert again.req.prefix_len == len(PROMPT) - 1
    assert again.slots[:-1] == request.slots[: len(PROMPT) - 1]
    again.answer()


def test_request_counts_as_one_hit_of_its_adapter(cache: AdapterCache) -> None:
    for num_requests in (1, 2, 3):
        request = Request(cache, "a")
        request.checkpoint()
        request.checkpoint()
        request.answer()
        assert cache.core.node_of("a").hit_count == num_requests
    assert cache.core.node_of("b").hit_count == 0


def test_session_turn_ends_with_its_request(cache: AdapterCache) -> None:
    request = Request(cache, "a", session="s")
    request.checkpoint()
    assert len(cache.core.sessions) == 0, "its prompt is no turn"
    request.answer()
    assert len(cache.core.sessions) == 1
    found = cache.match([*PROMPT, *ANSWER, 7], namespace_of("a"))
    end = cache.core.node_by_id(found.last_device_node)
    path = [node.entry for node in cache.core.path_of(end)]
    assert found.device_prefix_len == len(PROMPT) + len(ANSWER)
    assert [item.num_slots for item in path] == [len(ANSWER), len(PROMPT), 30]
    assert {item.session_state for item in path} == {SessionState.ALIVE}
    Request(cache, "a").answer()
    assert len(cache.core.sessions) == 1, "of no session"


def say(cache: AdapterCache, tokens: Sequence[int], *, is_chunked: bool = False) -> None:
    """A request whose last two tokens are the answer."""
    request = Request(cache, "a", tokens=tokens[:-2])
    if is_chunked:
        request.checkpoint()
    request.answer(tokens[-2:])


def turns(cache: AdapterCache, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Tokens and turns of each KV node on a path, from the top down."""
    found = cache.match([*tokens, 7777], namespace_of("a"))
    assert found.device_prefix_len == len(tokens)
    path = cache.core.path_of(cache.core.node_by_id(found.last_device_node))
    return [(node.entry.num_slots, node.entry.turns) for node in reversed(path)][1:]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_turns_count_the_finished_requests_of_a_conversation(
    cache: AdapterCache, is_chunked: bool
) -> None:
    """Two conversations share a system prompt of four tokens."""
    system, first, second = [1, 2, 3, 4], [*range(10, 16)], [*range(20, 26)]
    say(cache, [*system, *first], is_chunked=is_chunked)
    assert turns(cache, [*system, *first]) == [(8, 1), (2, 1)]
    say(cache, [*system, *first, *second], is_chunked=is_chunked)
    assert turns(cache, [*system, *first, *second]) == [(8, 1), (2, 1), (4, 2), (2, 2)]
    other = [*system, *range(30, 36)]
    say(cache, other, is_chunked=is_chunked)
    assert turns(cache, other) == [(4, 0), (4, 1), (2, 1)], "the system prompt is no turn"
    say(cache, [*other, *second], is_chunked=is_chunked)
    assert turns(cache, [*other, *second])[-1] == (2, 2)
    path = [*system, *first, *second]
    assert turns(cache, path) == [(4, 0), (4, 1), (2, 1), (4, 2), (2, 2)]


def test_turns_continue_after_the_conversation_was_evicted(cache: AdapterCache) -> None:
    """Its KV is recognised by the hash of its tokens, wherever nodes begin and end."""
    first, second = list(range(10, 18)), list(range(20, 26))
    say(cache, first)
    say(cache, [*first, *second])
    while cache.match([*first, 7], namespace_of("a")).device_prefix_len:
        cache.evict(1)
    assert len(cache.core.ghosts) == 4
    third = [*first, *second, *range(30, 36)]
    say(cache, third)
    assert turns(cache, third) == [(18, 3), (2, 3)]
    say(cache, [*range(40, 48)])
    assert turns(cache, [*range(40, 48)])[-1] == (2, 1), "another conversation"
    assert len(cache.core.ghosts) == 0


def test_turns_follow_a_client_that_leaves_out_part_of_the_answer(cache: AdapterCache) -> None:
    """As chat templates do with reasoning: the next prompt diverges after the first prompt."""
    say(cache, [1, 2, 3, 4, 50, 51])
    say(cache, [1, 2, 3, 4, 51, 5, 6, 52, 53])
    assert turns(cache, [1, 2, 3, 4, 51, 5, 6, 52, 53]) == [(4, 1), (3, 2), (2, 2)]


@pytest.mark.parametrize("policy", ["lru", "priority"])
def test_allocation_evicts_only_the_missing_slots(policy: str) -> None:
    """SGLang's walk may take all that can be evicted, and asks after each leaf whether it is
    enough."""
    for core in ("python", "elora"):
        cache = Cache(core, 100, policy)
        for first in range(0, 1000, 100):
            cache.insert(range(first, first + 10))
        evicted = cache.tree.evict_for_alloc(_evict_params(15))
        assert evicted.num_tokens_evicted == 20
        assert cache.allocator.available_size() == 20


def test_allocation_evicts_more_for_an_allocator_with_a_reserve() -> None:
    cache = Cache("elora", 100)
    for first in range(0, 1000, 100):
        cache.insert(range(first, first + 10))
    allocator: Any = cache.allocator
    available = allocator.available_size
    allocator.available_size = lambda: max(0, available() - 25)
    cache.tree.evict_for_alloc(_evict_params(15))
    assert allocator.available_size() == 15, "40 are free, 25 of them are kept back"


def _evict_params(num_tokens: int) -> Any:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    return EvictParams(num_tokens=num_tokens)


def test_touch_prefix_splits_no_node_under_an_elora_policy(cache: AdapterCache) -> None:
    cache.chat(PROMPT, "a")
    num_nodes = len(cache.core._node_arena)
    cache.tree.touch_prefix(cache._key(PROMPT[:4], namespace_of("a")))
    assert len(cache.core._node_arena) == num_nodes
