"""Admission: work per pass over the queue, and which requests block later ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.harness.swapper_world import MAX_BYPASS, Admission, SwapperWorld, adapter_id, preempt

SLOTS = 64  # of an adapter


class Running(set[Any]):
    """Adapters of a batch, which counts the copies that are made of it."""

    num_copies = 0

    def __sub__(self, other: Any) -> Any:
        self.num_copies += 1
        return super().__sub__(other)


def admission(num_adapters: int = 4) -> Admission:
    made = SwapperWorld(8 * SLOTS, num_adapters=num_adapters, adapter_slots=SLOTS)
    return Admission(made.residency, made.swapper, max_adapters=8)


def request(name: str | None, rid: str = "r") -> Any:
    return SimpleNamespace(lora_id=name, rid=rid, retracted_stain=True, origin_input_ids=range(5))


def one_pass(
    of: Admission, waiting: list[Any], running: frozenset[Any] = frozenset(), most: int = 10**9
) -> list[Any]:
    """The requests that SGLang takes when it asks about all in turn, until it has ``most``."""
    of.begin_pass(SimpleNamespace(can_run_list=[]))  # type: ignore[arg-type]
    taken: list[Any] = []
    for req in waiting:
        if len(taken) == most:
            break
        if of.admit(req, running):  # type: ignore[arg-type]
            req.last_node = of.residency.core.root_node.id
            of.taken(req)
            taken.append(req)
    return taken


def test_request_bypassed_too_often_blocks_only_later_requests() -> None:
    made = admission()
    cold = request(adapter_id(0))  # whose adapter is on the host
    for _ in range(MAX_BYPASS):
        first, last = request(None), request(None)
        assert one_pass(made, [first, cold, last]) == [first, last]
    assert one_pass(made, [first, cold, last]) == [first]
    scheduler: Any = SimpleNamespace(waiting_queue=[cold], chunked_req=None)
    for _ in range(2):  # the load starts and completes
        made.swapper.step(scheduler, is_busy=False)
    assert one_pass(made, [first, cold, last]) == [first, cold, last]


def test_earlier_requests_do_not_count_as_bypassing_a_cold_one() -> None:
    """A queue longer than the swapper's lookahead: if they did, the cold request would hold back
    the queue before the swapper sees it, and nothing would ever run again."""
    made = admission()
    cold, after = request(adapter_id(0)), request(None)
    waiting = [*(request(None) for _ in range(3 * MAX_BYPASS)), cold, after]
    while waiting[0] is not cold:
        assert one_pass(made, waiting, most=1) == waiting[:1]
        del waiting[0]
    assert one_pass(made, waiting) == [after]


def test_request_not_reached_in_a_pass_counts_no_bypass() -> None:
    made = admission()
    cold, after = request(adapter_id(0)), request(None)
    assert one_pass(made, [cold, after]) == [after]
    for _ in range(2 * MAX_BYPASS):  # the batch is full before its position
        assert len(one_pass(made, [request(None), cold, after], most=1)) == 1
    assert one_pass(made, [cold, after]) == [after]


def test_aborted_request_no_longer_blocks_the_queue() -> None:
    made = admission()
    cold, others = request(adapter_id(0)), [request(None) for _ in range(MAX_BYPASS)]
    assert one_pass(made, [cold, *others]) == others
    assert one_pass(made, [cold, *others]) == []
    assert one_pass(made, others) == others


def test_admission_keeps_no_state_of_aborted_requests() -> None:
    made = admission()
    for _ in range(3):
        assert one_pass(made, [request(adapter_id(0), str(i)) for i in range(2000)]) == []
    kept = [value for value in vars(made).values() if isinstance(value, dict | list | set)]
    assert kept == [], kept


def test_admission_pass_is_linear_in_the_queue_while_blocked() -> None:
    made = admission()
    cold, others = request(adapter_id(0)), [request(None) for _ in range(MAX_BYPASS)]
    one_pass(made, [cold, *others])
    num_compared = 0

    class Compared(SimpleNamespace):
        def __eq__(self, other: object) -> bool:
            nonlocal num_compared
            num_compared += 1
            return self is other

    waiting = [Compared(**vars(request(None))) for _ in range(2000)]
    assert one_pass(made, [cold, *waiting]) == []
    assert num_compared == 0  # no linear search


def test_retracted_request_counts_its_next_wait_separately() -> None:
    made = admission()
    counts, req = made.residency.core.counts, request(adapter_id(0))
    assert one_pass(made, [req]) == []
    req.lora_id = None
    for _ in range(2):
        assert one_pass(made, [req]) == [req]
        assert counts.requests_waited_for_adapter == 1


def test_retracted_request_keeps_its_bypass_count() -> None:
    made = admission()
    req, other = request(adapter_id(0)), request(None)
    for _ in range(MAX_BYPASS):
        assert one_pass(made, [req, other]) == [other]
    req.lora_id = None  # its adapter is resident
    assert one_pass(made, [req, other]) == [req, other]
    req.lora_id = adapter_id(0)  # it was retracted, and its adapter evicted
    assert one_pass(made, [req, other]) == []


def test_admission_does_not_copy_the_batch_adapters_per_request() -> None:
    made = admission()
    running: Any = Running({None, *(f"other{i}" for i in range(8))})
    assert one_pass(made, [request(adapter_id(0)) for _ in range(2000)], running) == []
    assert running.num_copies == 0


def test_preemption_keeps_the_adapter_of_the_request_it_makes_room_for() -> None:
    world = SwapperWorld(8 * SLOTS, num_adapters=1, adapter_slots=SLOTS)
    made, req = Admission(world.residency, world.swapper, max_adapters=8), request(adapter_id(0))
    scheduler: Any = SimpleNamespace(waiting_queue=[req], chunked_req=None)
    for _ in range(2):  # the load starts and completes
        world.swapper.step(scheduler, is_busy=False)
    adder: Any = SimpleNamespace(tree_cache=SimpleNamespace(elora=SimpleNamespace(admission=made)))

    def stays(*_: Any) -> bool:
        world.cache.evict(8 * SLOTS)
        return world.core.node_of(adapter_id(0)).adapter.resident

    assert preempt(stays, adder, req)
    assert not stays(), "nothing protects it any more"
