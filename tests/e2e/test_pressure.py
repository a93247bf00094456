"""Greedy outputs stay those of an idle device while adapters and KV are evicted and reloaded.

Every server gets the same chats. The first is SGLang as it is, with room for everything; the others
have room for at most a quarter of the adapters and KV, and run copies and batches in another order
that CUDA's streams would allow. PRESSURE_FULL=1 in the environment runs 600 requests, and every
order in every variant, and a model of twice as many layers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_elora.control.connections import LIMITS
from sglang_elora.testbed.server import ServerProcess, python_module
from tests.harness.disturbances import Disturb, flush_often, reload_copies
from tests.harness.pressure import (
    PRESSURE_SPECS,
    Model,
    Record,
    Trace,
    make_model,
    make_trace,
    pool_tokens,
    run_trace,
)
from tests.harness.reference import Reference
from tests.harness.server_flags import HOST_TIER, server_flags

ALL = "PRESSURE_FULL" in os.environ
CHATS = make_trace(small=not ALL)
pytestmark = pytest.mark.timeout(3600 if ALL else 600)
LONG_ANSWERS = make_trace(num_requests=600 if ALL else 60, output_tokens=(64, 128))

_ENV = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
_CHUNK = 32
_PAGE = 16
_ADAPTERS = 4
_TP_SIZE = 2
_DRAFTED = 6
_ROUNDING = 1e-4
"""Of a logit, in float32: with tokens so close, the answer depends on the sizes of batches."""
_Outputs = Mapping[tuple[int, int], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a run that a variant checks."""

    records: Sequence[Record]
    state: Mapping[str, int]  # "elora" of /server_info
    info: Mapping[str, Any]  # /server_info
    log: str


def _anything(outcome: Outcome) -> None:
    """This variant has no extra check."""


def _decode_ran_out_of_memory(outcome: Outcome) -> None:
    """Sixty requests do so in most runs, as their arrival has it; six hundred always."""
    full = r"KV cache pool is full\. Retract requests\. #retracted_reqs: [1-9]"
    num_times = len(re.findall(full, outcome.log))
    print(f"decode ran out of memory {num_times} times")
    assert num_times or not ALL


def _pages_chunks_aborts(outcome: Outcome) -> None:
    assert sum(record.num_aborted for record in outcome.records) > 20
    assert re.search(r"Testing retraction\. #retracted_reqs: [1-9]", outcome.log)
    assert outcome.info["page_size"] == _PAGE
    assert outcome.state["max_adapters_in_batch"] == _ADAPTERS
    assert all(record.num_cached % _PAGE == 0 for record in outcome.records)
    sizes = [int(n) for n in re.findall(r"Prefill batch.*?#new-token: (\d+)", outcome.log)]
    assert max(sizes) == _CHUNK
    assert max(record.num_prompt - record.num_cached for record in outcome.records) > _CHUNK


def _ranks_did_the_same(outcome: Outcome) -> None:
    """Loads and evictions of adapters, each in the same order with the same numbers."""
    journals = [
        re.findall(rf"TP{rank}\] ((?:load|evict) \w+.*)", outcome.log) for rank in range(_TP_SIZE)
    ]
    assert journals[0] == journals[1]
    assert len(journals[0]) == outcome.state["adapter_loads"] + outcome.state["adapter_evictions"]


def _requests_were_preempted(outcome: Outcome) -> None:
    num_preempted = sum(record.num_retractions for record in outcome.records)
    print(f"{num_preempted} preemptions")
    assert num_preempted > 0


def _drafts_were_accepted(outcome: Outcome) -> None:
    """Several tokens per step: KV of the accepted drafts was moved, of the others freed."""
    accepted = outcome.info["internal_states"][0]["avg_spec_accept_length"]
    print(f"{accepted} tokens per step and request")
    assert 1.2 < accepted <= _DRAFTED
    _kv_came_back_from_the_host(outcome)


def _kv_came_back_from_the_host(outcome: Outcome) -> None:
    from_host = sum(record.num_from_host for record in outcome.records)
    print(f"{from_host} prompt tokens from the host tier")
    assert from_host > 0


def _kv_was_copied_ahead_and_came_back(outcome: Outcome) -> None:
    _kv_came_back_from_the_host(outcome)
    assert 0 < outcome.state["kv_slots_copied_ahead"] <= outcome.state["kv_slots_to_host"]


def _kv_was_prefetched_and_used(outcome: Outcome) -> None:
    """Between a session's announcement and its request, or while a batch of others runs."""
    assert outcome.state["kv_slots_from_host"] > 0
    assert outcome.state["prefetched_slots_used"] > 0


def _cache_was_flushed(outcome: Outcome) -> None:
    assert outcome.log.count("Cache flushed successfully!") > 10


def _adapters_were_reloaded(outcome: Outcome) -> None:
    loaded = len(re.findall(r"POST /unload_lora_adapter HTTP/1.1. 200", outcome.log))
    assert loaded > 10
    assert outcome.state["adapter_loads"] >= loaded


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run under pressure, and how to see that it was run that way.

    ``orders`` are values of --elora-check-streams, each of them one run in CI; the others run with
    PRESSURE_FULL=1.
    """

    orders: tuple[str, ...]
    trace: Trace = CHATS
    share: float = 0.25  # of the trace's adapters and KV that the pool holds
    page_size: int = 1
    tp_size: int = 1
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    concurrency: int = 16
    rounds: int = 1  # how often the trace is run
    abort_every: int = 0
    names_sessions: bool = False
    num_priorities: int = 1
    programs: tuple[str, ...] = ()  # that it needs
    disturb: Disturb | None = None
    check: Callable[[Outcome], None] = _anything

    @property
    def pool_tokens(self) -> int:
        used = [spec for spec in PRESSURE_SPECS if spec.name in self.trace.adapters]
        return pool_tokens(used, self.trace, self.share, self.page_size, self.tp_size)


_LATEST, _EARLIEST, _SEEDED = ORDERS = ("latest", "earliest", "7")

VARIANTS = {
    "plain": Variant((_LATEST, _EARLIEST), share=0.15),
    "host-tier": Variant(
        (_LATEST,),
        flags=(*HOST_TIER, "write_back"),
        check=_kv_was_copied_ahead_and_came_back,
    ),
    "write-through": Variant(
        (_EARLIEST,), flags=(*HOST_TIER, "write_through"), check=_kv_came_back_from_the_host
    ),
    "sessions": Variant(
        (_LATEST, _EARLIEST),
        share=0.08 if ALL else 0.25,  # so small that KV is evicted between two turns
        flags=(*HOST_TIER, "write_back"),
        names_sessions=True,
        check=_kv_was_prefetched_and_used,
    ),
    "flushes": Variant(
        (_SEEDED,),
        share=0.08 if ALL else 0.25,  # so small that it fills between two flushes
        flags=(*HOST_TIER, "write_back"),
        concurrency=1,
        names_sessions=True,
        disturb=flush_often,
        check=_cache_was_flushed,
    ),
    "reloads": Variant((_SEEDED,), disturb=reload_copies, check=_adapters_were_reloaded),
    "pages-chunks-aborts": Variant(
        (_SEEDED,),
        page_size=_PAGE,
        flags=(
            *("--page-size", str(_PAGE), "--chunked-prefill-size", str(_CHUNK)),
            *("--elora-max-adapters-per-batch", str(_ADAPTERS)),
        ),
        env={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"},
        abort_every=5,
        check=_pages_chunks_aborts,
    ),
    "decode-runs-out": Variant(
        (_EARLIEST,),
        trace=LONG_ANSWERS,
        share=0.04 if ALL else 0.25,  # so small that running requests are retracted
        flags=("--schedule-conservativeness", "0.01"),
        concurrency=32,
        env={"SGLANG_RETRACT_DECODE_STEPS": "1", "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": "1"},
        check=_decode_ran_out_of_memory,
    ),
    "preemptions": Variant(
        (_EARLIEST,),
        flags=("--enable-priority-scheduling", "--max-running-requests", "4"),
        num_priorities=20,  # a preemption needs a difference of more than 10
        check=_requests_were_preempted,
    ),
    "drafted-ngrams": Variant(
        (_SEEDED,),
        trace=LONG_ANSWERS,
        rounds=2,  # drafts are continuations that earlier answers had
        flags=(
            *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(_DRAFTED)),
            *(*HOST_TIER, "write_back"),
        ),
        programs=("g++", "ninja"),  # SGLang compiles its tables of n-grams
        check=_drafts_were_accepted,
    ),
    "tokenizer-workers": Variant(
        (_EARLIEST,),
        flags=("--tokenizer-worker-num", "2"),
        disturb=reload_copies,
        check=_adapters_were_reloaded,
    ),
    "tensor-parallel": Variant(
        (_LATEST,),
        tp_size=_TP_SIZE,
        flags=("--tp-size", str(_TP_SIZE)),
        env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
        check=_ranks_did_the_same,
    ),
}
RUNS = [
    (name, order)
    for name, variant in VARIANTS.items()
    for order in (ORDERS if ALL else variant.orders)
]


@pytest.fixture(scope="module")
def model(models: Path) -> Model:
    return make_model(models, small=not ALL)


@pytest.fixture(scope="module")
def expected(model: Model, logs: Path) -> Iterator[dict[Trace, _Outputs]]:
    """Outputs of SGLang with all adapters and all KV on the device."""
    slots = len(model.adapters) + 1  # one for the base model
    flags = [
        *server_flags(model.checkpoint, model.adapters),
        *("--max-loras-per-batch", str(slots)),
        *("--max-total-tokens", str(CHATS.num_kv_tokens + LONG_ANSWERS.num_kv_tokens)),
    ]
    with ServerProcess(
        flags,
        log_path=logs / "pressure-stock.log",
        program=python_module("sglang.launch_server"),
        env=_ENV,
    ) as server:
        chats = _outputs(run_trace(server.url, CHATS))
        long_answers = _outputs(run_trace(server.url, LONG_ANSWERS))
    yield {CHATS: chats, LONG_ANSWERS: long_answers}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "order"), RUNS)
def test_outputs_equal_the_reference_under_pool_pressure(
    name: str,
    order: str,
    model: Model,
    expected: dict[Trace, _Outputs],
    logs: Path,
) -> None:
    variant = VARIANTS[name]
    if lacking := [program for program in variant.programs if shutil.which(program) is None]:
        pytest.skip(f"needs {lacking}")
    flags = [
        *("--elora", "--elora-check", "--elora-check-streams", order),
        *server_flags(model.checkpoint),
        *("--max-total-tokens", str(variant.pool_tokens), *variant.flags),
        *("--lora-paths", *(f"{name}={path}" for name, path in model.adapters.items())),
    ]
    log_path = logs / f"pressure-{name}-{order}.log"
    with ServerProcess(flags, log_path=log_path, env={**_ENV, **variant.env}) as server:
        records = run(server, variant, model.adapters)
        info = _idle_server_info(server)
        log = log_path.read_text()  # before the end: libraries report leaks of their own at exit
        assert server.returncode is None, server.log_tail()
    assert len(records) == variant.rounds * variant.trace.num_requests
    outcome = Outcome(records, info["internal_states"][0]["elora"], info, log)
    _print_counts(f"{name}, {order}", variant, outcome)
    _check_answers(records, variant.trace, expected[variant.trace], model)
    _check_pressure(outcome, variant)
    variant.check(outcome)
    assert not re.search("leak", log, re.IGNORECASE)


def run(server: ServerProcess, variant: Variant, adapters: Mapping[str, Path]) -> Sequence[Record]:
    records: list[Record] = []
    for _ in range(variant.rounds):
        records += run_trace(
            server.url,
            variant.trace,
            concurrency=variant.concurrency,
            abort_every=variant.abort_every,
            names_sessions=variant.names_sessions,
            num_priorities=variant.num_priorities,
            on_record=None if variant.disturb is None else variant.disturb(adapters),
        )
    return records


def _outputs(records: Sequence[Record]) -> _Outputs:
    assert not [record for record in records if record.error is not None]
    return {record.key: record.output for record in records}


def _idle_server_info(server: ServerProcess) -> dict[str, Any]:
    """Asked twice: between the two answers the scheduler was idle, and checked its pools."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        for _ in range(2):
            answer = http.get("/server_info")
            assert answer.status_code == httpx.codes.OK, answer.text
    info: dict[str, Any] = answer.json()
    return info


def _check_answers(
    records: Sequence[Record], trace: Trace, expected: _Outputs, model: Model
) -> None:
    assert not [(*record.key, record.error) for record in records if record.error is not None]
    others = [record for record in records if record.output != expected[record.key]]
    if not others:
        return
    reference = Reference(model.checkpoint, model.adapters)
    outputs = _outputs(records)
    shortfalls = {
        record.key: reference.shortfall(
            record.adapter, trace.prompt(record.key, outputs), record.output
        )
        for record in others
    }
    print(f"of other tokens than expected, and how far below the highest logit: {shortfalls}")
    wrong = [record for record in others if shortfalls[record.key] > _ROUNDING]
    first = [(*record.key, record.adapter, record.num_cached) for record in wrong[:5]]
    assert not wrong, f"{len(wrong)} of {len(records)} are wrong, the first ones: {first}"


def _check_pressure(outcome: Outcome, variant: Variant) -> None:
    """The pool was full, adapters were evicted and loaded back, KV was hit, none was invalid."""
    state = outcome.state
    assert state["checks"] > 0
    assert state["stream_operations_delayed"] > 0 and state["stream_orders_checked"] > 0
    assert state["pool_slots"] == variant.pool_tokens
    assert state["adapter_evictions"] > 0
    assert state["adapter_loads"] > len(variant.trace.adapters), "no adapter came back"
    left = state["adapter_loads"] - state["adapter_evictions"]
    assert state["adapters_resident"] == left or variant.disturb is flush_often
    assert state["adapter_slots"] + state["kv_tokens_device"] <= state["pool_slots"]
    assert state["kv_tokens_invalid"] == 0
    assert sum(record.num_cached for record in outcome.records) > 0


def _print_counts(name: str, variant: Variant, outcome: Outcome) -> None:
    cached = sum(record.num_cached for record in outcome.records)
    asked = sum(record.num_prompt for record in outcome.records)
    print(
        f"\n{name}: {len(outcome.records)} requests, {len(variant.trace.adapters)} adapters, "
        f"{cached} of {asked} prompt tokens from the cache, {dict(outcome.state)}"
    )
