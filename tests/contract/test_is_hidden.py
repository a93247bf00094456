"""When a batch may be started before an adapter's copy is over: ``Swapper.is_hidden``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.contract.test_swapper import SLOTS, world
from tests.harness.swapper_world import SwapperWorld, adapter_id


class Adder:
    """A prefill batch being formed while another batch runs, with one request so far."""

    def __init__(self, *, num_tokens: int = 10, chunk: int | None = None) -> None:
        self.can_run_list = [object()]
        self.log_input_tokens = num_tokens
        self.rem_chunk_tokens = chunk


def with_two_copies(made: SwapperWorld, prompt_tokens: int) -> Any:
    """The request for the second of two adapters under way, whose copies take 4.05 s together.

    A batch takes 1 s, and 0.1 s per token.
    """
    costs = made.measured.costs
    costs.batch, costs.recompute = 1.0, 0.1
    costs.load, costs.load_latency = 2.0 / SLOTS, 0.05
    made.arrive(adapter_id(0))
    req = made.arrive(adapter_id(1), prompt_tokens)
    made.step()
    return req


@pytest.mark.parametrize(("prompt_tokens", "hidden"), [(30, False), (31, True)])
def test_is_hidden_is_true_if_the_prefill_outlasts_the_copy(
    prompt_tokens: int, hidden: bool
) -> None:
    made = world(8 * SLOTS)
    req = with_two_copies(made, prompt_tokens)
    copy = made.residency.copies[adapter_id(1)]
    busy: Any = Adder()
    assert made.swapper.is_hidden(copy, req, busy) is hidden
    assert made.swapper.is_hidden(made.residency.copies[adapter_id(0)], req, busy)
    idle = SimpleNamespace(can_run_list=[], running_batch=SimpleNamespace(is_empty=lambda: True))
    assert made.swapper.is_hidden(copy, req, idle)  # there is nothing else to do


def test_is_hidden_counts_no_computation_of_a_prefill_graph_batch() -> None:
    """The graph waits for the whole copy before it starts, so the batch would only stall."""
    made = world(8 * SLOTS)
    req = with_two_copies(made, 100)
    made.residency.replays_prefill_graph = lambda requests, tokens: requests <= 2 and tokens <= 60
    copy = made.residency.copies[adapter_id(1)]
    for adder, hidden in (
        (Adder(), True),  # 110 tokens: more than the graph takes
        (Adder(chunk=50), False),  # a chunk of 50 of them is replayed
        (Adder(num_tokens=11, chunk=50), True),
    ):
        assert made.swapper.is_hidden(copy, req, adder) is hidden  # type: ignore[arg-type]


def test_is_hidden_counts_batches_launched_since_the_copy_was_started() -> None:
    """Each of them runs before the batch that waits, for a second at least; copies take 4.05 s."""
    made = world(8 * SLOTS)
    req = with_two_copies(made, 100)
    made.residency.replays_prefill_graph = lambda requests, tokens: True
    from sglang_elora.srt.scheduler.swapper import prepare

    server: Any = SimpleNamespace(tree_cache=SimpleNamespace(elora=made))
    copy, adder = made.residency.copies[adapter_id(1)], Adder()
    hidden = []
    for _ in range(6):
        hidden.append(made.swapper.is_hidden(copy, req, adder))  # type: ignore[arg-type]
        prepare(None, server)
    assert hidden == [False] * 5 + [True]
