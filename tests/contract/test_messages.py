"""Messages of the control channel, as both of SGLang's encodings carry them, and as noise."""

from __future__ import annotations

import pickle
import random
import warnings
from typing import Any

import pytest
from sglang.utils import TypeBasedDispatcher

from tests.harness.programs import source
from tests.harness.run_python import RunPython
from tests.harness.swapper_world import SwapperWorld, adapter_id

with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang.utils import TypeBasedDispatcher

    from sglang_elora.srt.messages import AdapterHint, AdapterOrder, StateRequest, Undecodable
    from sglang_elora.srt.scheduler.scheduler_control import Control


def test_messages_round_trip_through_the_channel(run_python: RunPython) -> None:
    done = run_python("-c", source("messages_round_trip"))
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


def channel() -> tuple[SwapperWorld, TypeBasedDispatcher]:
    made = SwapperWorld(8 * 64, num_adapters=4, adapter_slots=64)
    dispatcher = TypeBasedDispatcher([])
    Control(made.scheduler, made.swapper).add_to(dispatcher)
    return made, dispatcher


def dropped(made: SwapperWorld) -> int:
    return int(made.residency.statistics()["messages_dropped"])


@pytest.mark.parametrize(
    "message",
    [
        7,
        b"bytes",
        None,
        Undecodable(reason="not a message"),
        AdapterHint(adapters=7),
        AdapterHint(adapters=[["nested"]]),
        AdapterHint(adapters=["x", 7]),
        AdapterHint(adapters=[], sessions=[7]),
        StateRequest(version="new"),
        AdapterOrder(do=["pin"], adapter=adapter_id(0)),
        AdapterOrder(do="pin", adapter=None),
    ],
    ids=str,
)
def test_malformed_message_is_only_counted_as_dropped(message: Any) -> None:
    made, dispatcher = channel()
    assert dispatcher(message) is None
    assert dropped(made) == 1
    made.step()
    assert made.residency.adapter_table.num_resident == 0
    made.check()


def test_hints_for_unknown_adapters_leave_no_pending_state() -> None:
    made, dispatcher = channel()
    for i in range(10_000):
        dispatcher(AdapterHint(adapters=[f"nobody-{i}"]))
    made.step()
    assert made.residency.statistics()["hints_dropped"] == 10_000
    assert not made.swapper.planner.pending
    made.check()


def test_corrupted_orders_leave_a_consistent_cache(seed: int = 0) -> None:
    """Truncate and change bytes of orders; what still decodes is executed or dropped."""
    made, dispatcher = channel()
    rng = random.Random(seed)
    whole = [
        pickle.dumps(AdapterOrder(do=do, adapter=adapter_id(i)))
        for do in ("prefetch", "pin", "unpin", "evict")
        for i in range(4)
    ]
    for i in range(3_000):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randrange(3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            message = pickle.loads(bytes(data))
        except Exception as error:  # noqa: BLE001  # as ``messages.receive`` has it
            message = Undecodable(reason=str(error))
        dispatcher(message)
        if i % 10 == 0:
            made.step()
            made.swapper.prepare()
    made.check()
