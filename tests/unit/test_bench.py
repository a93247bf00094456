"""The benchmark's pure parts: goodput, API events, plans, endpoints, plots and the page."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.bench.__main__ import QUICK, SWEEP, SWEPT, main_sides, parse, plan_of
from sglang_elora.bench.apis import Answer, ChatCompletions, Completions, Native, words
from sglang_elora.bench.endpoint import Endpoint, EndpointError, find
from sglang_elora.bench.figures import Bars, figures, warm_up_s
from sglang_elora.bench.matrix import in_turn
from sglang_elora.bench.page import page
from sglang_elora.bench.plain_table import markdown_table, plain_table
from sglang_elora.bench.plots import save_plots
from sglang_elora.bench.pool import of_elora, of_stock
from sglang_elora.bench.record import PoolSample, Record
from sglang_elora.bench.result import Result, by_block
from sglang_elora.bench.sides import Sizes, make_side
from sglang_elora.bench.variant import write_plugin
from sglang_elora.workloads import CHAT, Session, Turn, make_trace

TURNS = (Turn((3, 4), 2, 0.0), Turn((5,), 2, 1.0))
SESSION = Session(7, "a001", 0.0, (9, 9), TURNS)


def record(
    number: int, ttft_ms: float | None, tpot_ms: float = 10.0, num_output: int = 3
) -> Record:
    first_s = None if ttft_ms is None else number + ttft_ms / 1e3
    last_s = None if first_s is None else first_s + (num_output - 1) * tpot_ms / 1e3
    return Record(
        session=number,
        turn=0,
        adapter="a000",
        due_s=float(number),
        sent_s=float(number),
        first_s=first_s,
        last_s=last_s,
        num_prompt=10,
        num_cached=4,
        num_from_host=1,
        output=(1,) * num_output,
        error="gone" if ttft_ms is None else None,
    )


def result(side: str, rate: float = 2.0, number: int = 0, ttft_ms: float = 100) -> Result:
    records = tuple(record(i, ttft_ms + i) for i in range(10))
    uses = {"adapters": 30, "kv_of_adapters": 50, "kv_of_base": 0, "running": 10, "free": 10}
    is_elora = side.startswith("elora")
    pool = tuple(
        PoolSample(0.5 * i, 100, uses, 50, 5, 0, 1)
        if is_elora
        else PoolSample(0.5 * i, 100, {"running": 10}, None, None, 0, 1)
        for i in range(4)
    )
    times = (None, None, rate, pool)
    return Result("chat", side, number, 10.0, records, *times, warm_up_s=2.0)


def test_goodput_is_the_share_of_requests_within_both_limits() -> None:
    records = [
        record(2, 400),
        record(3, 600),  # late
        record(4, 400, tpot_ms=60),  # slow
        record(5, None),  # failed
        record(6, 500, tpot_ms=60, num_output=1),  # has no second token
        record(0, 900),  # in the warm-up
    ]
    assert figures(records, 2.0, 10.0, bars=Bars(500, 50))["goodput"] == 2 / 5
    assert figures(records, 2.0, 10.0, bars=Bars(700, 70))["goodput"] == 4 / 5


def test_warm_up_is_a_session_life_between_a_fifth_and_half_of_the_trace() -> None:
    assert warm_up_s(300.0, 123.0) == 123.0
    assert warm_up_s(300.0, 6.75) == 60.0
    assert warm_up_s(75.0, 123.0) == 37.5
    chat = make_trace(CHAT, turns_per_s=4, duration_s=10)
    assert chat.mean_life_s == pytest.approx(6 * 20.5)


def test_native_chat_history_is_the_exact_tokens() -> None:
    talk = Native(SESSION)
    assert talk.ask(TURNS[0])["input_ids"] == [9, 9, 3, 4]
    answer = Answer()
    event = {"output_ids": [1, 2], "meta_info": {"cached_tokens": 3, "cached_tokens_details": None}}
    assert talk.read(event, answer)
    talk.said(answer)
    assert talk.ask(TURNS[1])["input_ids"] == [9, 9, 3, 4, 1, 2, 5]
    assert (answer.num_output, answer.num_prompt, answer.num_cached) == (2, 4, 3)


def test_openai_stream_events_are_read_into_answers() -> None:
    usage = {
        "prompt_tokens": 8,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    for talk, key in (
        (Completions(SESSION, "m"), "text"),
        (ChatCompletions(SESSION, "m"), "delta"),
    ):
        talk.ask(TURNS[0])
        answer = Answer()
        for text in ("one", " two"):
            piece = text if key == "text" else {"content": text}
            assert talk.read({"choices": [{key: piece}]}, answer)
        empty = "" if key == "text" else {"role": "assistant"}
        assert not talk.read({"choices": [{key: empty, "finish_reason": "length"}]}, answer)
        assert not talk.read({"choices": [], "usage": usage}, answer)
        talk.said(answer)
        assert (answer.num_output, answer.num_prompt, answer.num_cached) == (2, 8, 5)
        body = talk.ask(TURNS[1])
        if key == "text":
            assert body["prompt"] == f"{words((9, 9))} {words((3, 4))}one two {words((5,))}"
        else:
            said = [message["content"] for message in body["messages"]]
            assert said == [words((9, 9)), words((3, 4)), "one two", words((5,))]


def test_stream_error_becomes_the_answers_error() -> None:
    for talk in (Native(SESSION), Completions(SESSION, "m")):
        answer = Answer()
        assert not talk.read({"error": {"message": "no"}}, answer)
        assert answer.error == "{'message': 'no'}"


def test_bench_pool_sample_counts_kv_without_its_adapter() -> None:
    rows = [
        {"tier": tier, "kv_tokens_device": n}
        for tier, n in (("device", 5), ("host", 3), ("disk", 1))
    ]
    pool = {"slots": 9, "uses": {}, "kv": 9, "num_waiting": 1, "num_running": 2}
    assert of_elora(1.0, {"adapters": rows, "pool": pool}).invalid_kv == 4
    load = {"max_total_num_tokens": 9, "num_used_tokens": 4}
    load |= {"num_waiting_reqs": 0, "num_running_reqs": 1}
    stock = of_stock(1.0, {"loads": [load]})
    assert (stock.uses, stock.invalid_kv) == ({"running": 4}, None)


def test_bench_options_select_quick_or_full_plan() -> None:
    assert plan_of(parse(["--quick"])).sides == QUICK.sides
    assert plan_of(parse(["--quick", "--runs", "2"])).runs == 2
    assert len(plan_of(parse([])).swept_sides) == len(SWEEP) * len(SWEPT)
    main = plan_of(parse(["--main", "--slots", "10", "--workloads", "chat"]))
    assert (main.runs, main.duration_s, main.workloads) == (5, 300.0, ["chat"])
    assert main.sides == main_sides(10) and main.swept_sides == ()
    assert main.sides[-2:] == ("stock-tuned:10+grouped+overlap", "elora:elora")
    assert any(side.endswith("+grouped+overlap") for side in QUICK.sides)
    assert QUICK.allow_dirty and not main.allow_dirty
    assert plan_of(parse(["--sides", "elora:lru"])).swept_sides == ()
    with pytest.raises(ValueError, match="--duration must be positive, got 0"):
        plan_of(parse(["--duration", "0"]))


def test_bench_turns_the_order_of_sides_around_and_rotates_it() -> None:
    sides = [make_side(f"elora:{policy}", Sizes(), 8, 100) for policy in ("lru", "gdsf", "elora")]
    orders = [[side.name[6:] for side in in_turn(sides, number)] for number in range(4)]
    assert orders == [
        ["lru", "gdsf", "elora"],
        ["elora", "gdsf", "lru"],
        ["gdsf", "elora", "lru"],
        ["lru", "elora", "gdsf"],
    ]


def test_bench_variant_plugin_points_at_the_named_function(tmp_path: Path) -> None:
    source = tmp_path / "changes.py"
    source.write_text("def slow():\n    pass\n\ndef _inner():\n    pass\n")
    folder, beside = write_plugin(tmp_path / "plugins", source, "slow")
    assert beside == tmp_path
    (entry,) = folder.glob("*.dist-info/entry_points.txt")
    assert "variant_slow = changes:slow" in entry.read_text()
    with pytest.raises(ValueError, match="'fast' must be one of slow"):
        write_plugin(tmp_path / "plugins", source, "fast")


CARDS = {
    "data": [
        {"id": "m", "owned_by": "sglang", "parent": None},
        {"id": "x", "owned_by": "sglang", "parent": "m"},
        {"id": "y", "owned_by": "sglang", "parent": "m"},
    ]
}


@contextmanager
def answering(status: int, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the URL of a server that answers every request with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_bench_endpoint_is_detected_from_its_model_list() -> None:
    with answering(200, CARDS) as url:
        found = find(url, "openai", None, None)
        assert (found.model, found.adapters) == ("m", ("x", "y"))
        assert found.model_name("x") == "m:x" and found.model_name("") == "m"
        assert replace(found, is_sglang=False).model_name("x") == "x"
        assert find(url, "openai", "m", []).adapters == ()
        with pytest.raises(EndpointError, match="does not serve adapter z, but x, y"):
            find(url, "openai", None, ["z"])
        with pytest.raises(EndpointError, match="does not serve model 'n', but m"):
            find(url, "openai", "n", None)


def test_bench_refuses_endpoints_of_another_api() -> None:
    with (
        answering(200, {"data": [{"id": "m", "owned_by": "vllm"}]}) as url,
        pytest.raises(EndpointError, match="is not SGLang"),
    ):
        find(url, "native", None, None)
    with answering(404, {}) as url, pytest.raises(EndpointError, match="answers 404: --url is"):
        find(url, "openai", None, None)
    with answering(200, {}) as url, pytest.raises(EndpointError, match="is not the OpenAI API's"):
        find(url, "openai", None, None)
    with pytest.raises(EndpointError, match="no server at"):
        find("http://127.0.0.1:1", "openai", None, None)


def test_bench_trace_is_assigned_the_servers_adapters() -> None:
    trace = make_trace(CHAT, turns_per_s=4, duration_s=10)
    few = Endpoint("", "openai", "m", ("x", "y"), True)
    assert {session.adapter for session in few.assigned(trace).sessions} == {"x", "y"}
    none = replace(few, adapters=())
    assert {session.adapter for session in none.assigned(trace).sessions} == {""}


def test_report_tables_are_not_wrapped_or_truncated() -> None:
    rows = [["a" * 150, "1"], ["b", "[red]"]]
    assert plain_table(["", "x" * 150], rows).splitlines()[1].split() == ["a" * 150, "1"]
    head, rule, first, second = markdown_table(["side", "n"], rows).splitlines()
    assert head.startswith("| side ") and set(rule) <= set("|-: ")
    assert first.split("|")[1].strip() == "a" * 150 and "[red]" in second


def test_report_groups_results_by_rate() -> None:
    results = [result("stock-default", rate) for rate in (2.0, 4.0)]
    assert list(by_block(results)) == ["chat at 2 turns/s", "chat at 4 turns/s"]
    assert list(by_block(results[:1])) == ["chat"]


def test_report_writes_plots_and_a_self_contained_page(tmp_path: Path) -> None:
    results = [
        result(side, rate, number, ttft_ms)
        for side, ttft_ms in (("stock-default", 300), ("stock-tuned:8", 200), ("elora:elora", 100))
        for rate in (2.0, 4.0)
        for number in (0, 1)
    ]
    plots = save_plots(results, tmp_path)
    files = {path.name for path in plots.values()}
    assert files == {
        *("latency.png", "cdf.png", "hits.png", "invalid_kv.png", "rates.png", "pool.png"),
    }
    text = page("title <b>", results, {"cpu": "2 x some", "link": None}, plots)
    assert "title &lt;b&gt;" in text
    assert text.count("data:image/png;base64,") == len(plots)
    assert "http" not in text.replace("data:image", "")
    assert "elora:elora / stock-default" in text
    assert "Not told by the servers of stock-default, stock-tuned:8" in text


def test_bench_rows_are_read_back_into_results() -> None:
    before = result("elora:lru")
    row = {
        "side": "elora:lru",
        "run": 0,
        "trace": {"workload": {"name": "chat"}, "duration_s": 10.0, "turns_per_s": 2.0},
        "elora_before": None,
        "elora_after": None,
        "pool": [asdict(sample) for sample in before.pool],
        "records": [asdict(r) for r in before.records],
    }
    assert Result.from_row(json.loads(json.dumps(row))) == before
