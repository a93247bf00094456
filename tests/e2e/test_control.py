"""Hints, state and orders on a real server: the reported state is the actual state."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from sglang_elora.commands.cli import main
from sglang_elora.control.hint_limiter import GAP_S
from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client
from tests.harness.control import adapter, off_device, on_device, order, state, until
from tests.harness.manifests import engine
from tests.harness.plugin_packages import install_plugin
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

FRESH_S = 1.1  # the age after which a scrape refreshes


NAMES = ("qv-r4", "attention-r8", "attention-r24", "mlp-r24", "all-r4", "rslora-r8")
ADMIN_KEY, USER_KEY = "let-me-in", "let-me-ask"
ORDERS = ("prefetch", "pin", "unpin", "evict")


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("switch") / "noise"


@pytest.fixture(scope="module")
def server(
    checkpoint: Path,
    adapters: dict[str, Path],
    noise: Path,
    logs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    plugins = tmp_path_factory.mktemp("plugins")
    install_plugin(plugins, "noise")
    given = {name: adapters[name] for name in NAMES}
    flags = ["--elora", "--elora-check", "--enable-metrics", *server_flags(checkpoint, given)]
    paths = (str(plugins), os.environ.get("PYTHONPATH"))
    env = {"NOISE": str(noise), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log_path = logs / "control.log"
    with ServerProcess(flags, log_path=log_path, env=env) as server:
        yield server
        assert "AssertionError" not in log_path.read_text()


async def test_state_has_every_adapter_and_adds_up(
    client: Client, prompts: Sequence[list[int]]
) -> None:
    await asyncio.gather(*(client.generate(name, prompts[1]) for name in NAMES[:3]))
    await client.generate(None, prompts[1])
    found = await state(client)
    rows = {row["lora_name"]: row for row in found["adapters"]}
    assert set(rows) == set(NAMES)
    for name in NAMES[:3]:
        row = rows[name]
        assert row["tier"] == "device" and row["slots"] > 0 and row["host_bytes"] > 0
        assert row["kv_tokens_device"] >= len(prompts[1])
        assert row["visits"] >= 1 and 0 <= row["idle_s"] < 60
        assert row["computed_tokens"] >= len(prompts[1]) and row["generated_tokens"] >= 32
    pool = found["pool"]
    assert pool["adapters"] == sum(row["slots"] for row in rows.values())
    of_adapters = sum(row["kv_tokens_device"] for row in rows.values())
    assert pool["kv"] == of_adapters + pool["kv_base"] and pool["kv_base"] > 0
    assert pool["free"] + pool["adapters"] + pool["kv"] == pool["slots"] == 12000
    assert pool["num_on_device"] == sum(row["tier"] == "device" for row in rows.values())
    assert pool["num_waiting"] == pool["num_running"] == 0


async def test_prefetched_adapter_is_resident_before_its_request(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    await off_device(client, "mlp-r24")
    await on_device(client, "mlp-r24")
    before = (await state(client))["pool"]["counts"]
    answer = await client.generate("mlp-r24", prompts[0])
    after = (await state(client))["pool"]["counts"]
    assert list(answer.token_ids) == reference.generate("mlp-r24", prompts[0])
    assert after["adapter_loads"] == before["adapter_loads"]
    assert after["hints_used"] == before["hints_used"] + 1


async def test_state_counts_hits_by_tier(client: Client, prompts: Sequence[list[int]]) -> None:
    await off_device(client, "all-r4")
    found = [(await state(client))["pool"]["counts"]]
    for _ in range(2):
        await client.generate("all-r4", prompts[1])
        found.append((await state(client))["pool"]["counts"])
    await off_device(client, "all-r4")
    found.append((await state(client))["pool"]["counts"])
    cold, warm, gone = ({n: y[n] - x[n] for n in y if y[n] != x[n]} for x, y in pairwise(found))
    length = len(prompts[1])
    assert cold["prompt_tokens.computed"] == length and "prompt_tokens.device" not in cold
    assert cold["adapter_lookups.host"] == cold["adapter_loads"] == 1
    assert warm["adapter_lookups.device"] == 1 and "adapter_loads" not in warm
    assert warm["prompt_tokens.device"] == length - 1 and warm["prompt_tokens.computed"] == 1
    assert gone["adapter_evictions.api"] == gone["adapter_evictions"] == 1
    assert gone["kv_slots_evicted.api"] == gone["kv_slots_evicted"] >= length


async def test_prefetch_of_a_list_loads_all_its_adapters(client: Client) -> None:
    names = ["all-r4", "rslora-r8"]
    for name in names:
        await off_device(client, name)
    answer = await client.post("/elora/prefetch", {"lora_name": names})
    assert answer.status_code == 200 and set(answer.json()["tiers"]) == set(names)
    for name in names:
        await until(lambda row: row["tier"] == "device", client, name)


async def test_prefetch_to_the_host_loads_nothing_to_the_device(client: Client) -> None:
    await off_device(client, "all-r4")
    body = {"lora_name": ["all-r4", "rslora-r8"], "tier": "host"}
    answer = await client.post("/elora/prefetch", body)
    assert answer.status_code == 200 and answer.json()["tiers"]["all-r4"] == "host"
    await asyncio.sleep(0.5)
    assert (await adapter(client, "all-r4"))["tier"] == "host"
    assert (await client.post("/elora/prefetch", {**body, "tier": "gpu"})).status_code == 400


async def test_evict_order_removes_adapter_and_kv_and_output_is_unchanged(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    """The pool is not full: entries evicted for capacity would be prefetched again."""
    expected = reference.generate("attention-r8", prompts[1])
    for _ in range(2):
        answer = await client.generate("attention-r8", prompts[1])
        assert list(answer.token_ids) == expected
    assert answer.cached_tokens > 0
    await off_device(client, "attention-r8")
    await asyncio.sleep(0.5)
    row = await adapter(client, "attention-r8")
    assert row["slots"] == row["kv_tokens_device"] == 0
    answer = await client.generate("attention-r8", prompts[1])
    assert list(answer.token_ids) == expected and answer.cached_tokens == 0


async def test_pin_ends_with_its_lease(client: Client) -> None:
    await order(client, "pin", "qv-r4", lease_s=1.5)
    await until(lambda row: row["pinned"] and row["tier"] == "device", client, "qv-r4")
    assert 0 < (await adapter(client, "qv-r4"))["lease_s"] <= 1.5
    refused = await client.post("/elora/evict", {"lora_name": "qv-r4"})
    assert refused.status_code == 400 and "pinned" in refused.json()["error_message"]
    await until(lambda row: not row["pinned"], client, "qv-r4")
    await order(client, "pin", "qv-r4", lease_s=0.5)
    await order(client, "pin", "qv-r4")  # replaces the lease
    await asyncio.sleep(1)
    row = await adapter(client, "qv-r4")
    assert row["pinned"] and row["lease_s"] is None
    await order(client, "unpin", "qv-r4")
    assert not (await adapter(client, "qv-r4"))["pinned"]
    await off_device(client, "qv-r4")


async def test_evict_order_for_an_adapter_in_use_is_refused(
    client: Client, prompts: Sequence[list[int]]
) -> None:
    running = await client.begin("all-r4", prompts[0], num_tokens=200)
    refused = await client.post("/elora/evict", {"lora_name": "all-r4"})
    assert refused.status_code == 400 and "uses the adapter" in refused.text
    assert len((await running).token_ids) == 200


@pytest.mark.parametrize("what", ORDERS)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"lora_name": "no-such-adapter"}, 400),
        ({"lora_name": ""}, 400),
        ({"lora_name": 7}, 400),
        ({}, 400),
    ],
)
async def test_malformed_orders_are_refused(
    client: Client, what: str, body: dict[str, Any], status: int
) -> None:
    answer = await client.post(f"/elora/{what}", body)
    assert answer.status_code == status, answer.text
    assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("lease_s", [0, -1, "long", float("1e999")])
async def test_invalid_leases_are_refused(client: Client, lease_s: Any) -> None:
    body = {"lora_name": "qv-r4", "lease_s": lease_s if lease_s != float("inf") else "Infinity"}
    answer = await client.post("/elora/pin", body)
    assert answer.status_code == 400, answer.text
    assert not (await adapter(client, "qv-r4"))["pinned"]


async def test_state_of_an_unknown_adapter_is_refused(client: Client) -> None:
    answer = await client.get("/elora/state?lora_name=nobody")
    assert answer.status_code == 400
    assert answer.json()["error_message"] == "LoRA adapter 'nobody' is not loaded"


async def test_model_list_shows_tiers_and_openapi_lists_all_endpoints(client: Client) -> None:
    await on_device(client, "attention-r24")
    models = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
    assert models["attention-r24"]["tier"] == "device"
    assert "tier" not in models["demo"]
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/elora/state", *(f"/elora/{what}" for what in ORDERS)} <= set(paths)
    assert "/v1/models" in paths


async def scraped_after_use(client: Client, prompt: list[int]) -> list[Metric]:
    """The metrics after a request with "mlp-r24", which is on the device."""
    await on_device(client, "mlp-r24")
    await client.generate("mlp-r24", prompt)
    await asyncio.sleep(FRESH_S)
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    return [*text_string_to_metric_families(answer.text)]


async def test_metrics_endpoint_exports_sglang_and_elora_metrics(
    client: Client, prompts: Sequence[list[int]]
) -> None:
    found = {
        (sample.name, sample.labels.get("tier") or sample.labels.get("use")): sample.value
        for family in await scraped_after_use(client, prompts[0])
        for sample in family.samples
    }
    assert ("sglang:num_running_reqs", None) in found, "SGLang's own"
    now = await state(client)
    tiers = [row["tier"] for row in now["adapters"]]
    assert found["sglang:elora_adapters", "device"] == tiers.count("device")
    assert found["sglang:elora_pool_slots", "adapters"] == now["pool"]["adapters"]
    loads = now["pool"]["counts"]["adapter_loads"]
    assert found["sglang:elora_adapter_loads_total", None] == loads > 0
    assert found["sglang:elora_adapter_load_seconds_count", None] == loads


async def test_endpoint_picker_finds_its_metrics_and_an_idle_adapter(
    client: Client, prompts: Sequence[list[int]]
) -> None:
    families = {family.name: family for family in await scraped_after_use(client, prompts[0])}
    specs = {name: spec for name, spec in engine().items() if name.endswith("Spec")}
    for spec in specs.values():
        assert families[spec].type == "gauge"
        assert len(families[spec].samples) == 1, spec
    (info,) = families[specs["loraSpec"]].samples
    assert "mlp-r24" in info.labels["running_lora_adapters"].split(",")
    (loaded,) = [
        sample.labels
        for sample in families["sglang:lora_adapter_loaded"].samples
        if sample.labels["adapter_name"] == "mlp-r24"
    ]
    assert (loaded["level"], loaded["pinned"]) == ("gpu", "false")
    pages = families[specs["cacheNumBlocksSpec"]].samples[0].value
    size = families[specs["cacheBlockSizeSpec"]].samples[0].value
    assert pages * size == (await state(client))["pool"]["slots"]


async def test_top_shows_the_server_and_the_ui_page_is_served(
    client: Client, server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--url", server.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "12000 slots" in shown and all(name in shown for name in NAMES)
    page = await client.get("/elora/ui")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert 'fetch("state"' in page.text and "http" not in page.text, "nothing from elsewhere"


async def test_state_lists_an_adapter_from_load_to_unload(
    client: Client, adapters: dict[str, Path]
) -> None:
    body = {"lora_name": "late", "lora_path": str(adapters["qv-r4"])}
    assert (await client.post("/load_lora_adapter", body)).status_code == 200
    await on_device(client, "late")
    assert (await client.post("/unload_lora_adapter", {"lora_name": "late"})).is_success
    rows = (await state(client))["adapters"]
    assert {row["lora_name"] for row in rows} == set(NAMES)


async def test_chat_request_announces_its_adapter(
    client: Client, prompts: Sequence[list[int]]
) -> None:
    await off_device(client, "rslora-r8")
    before = await state(client)
    for model in ("demo:rslora-r8", "demo:no-such-adapter"):
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        await client.post("/v1/chat/completions", {**body, "max_tokens": 4})
    after = await state(client)
    assert after["hints"]["sent"] == before["hints"]["sent"] + 1
    counts = after["pool"]["counts"]
    assert counts["hints"] == before["pool"]["counts"]["hints"] + 1


def kv_hints(payload: Any, kind: str = "elora.prefetch", version: str = "1") -> dict[str, Any]:
    action = {"action_id": "a", "action_type": kind, "action_version": version, "payload": payload}
    return {"protocol_version": "1", "message_id": "m", "actions": [action]}


async def test_client_hints_prefetch_the_named_adapters(
    client: Client, prompts: Sequence[list[int]]
) -> None:
    names = ["rslora-r8", "attention-r24"]
    for name in names:
        await off_device(client, name)
    await asyncio.sleep(GAP_S)  # within which nothing is announced again
    hints = kv_hints({"lora_name": [*names, "no-such-adapter"]})
    await client.generate("qv-r4", prompts[0], kv_hints=hints)
    for name in names:
        await until(lambda row: row["tier"] == "device", client, name)
    await off_device(client, "rslora-r8")
    await asyncio.sleep(GAP_S)
    await client.generate(None, prompts[0], kv_hints=kv_hints({"lora_name": "rslora-r8"}))
    await until(lambda row: row["tier"] == "device", client, "rslora-r8")
    await client.generate(None, prompts[0], kv_hints=kv_hints({"other": 1}, kind="theirs"))


@pytest.mark.parametrize(
    ("hints", "text"),
    [
        (kv_hints({}), "missing required field `lora_name`"),
        (kv_hints({"lora_name": 7}), "Expected `str | array`"),
        (kv_hints({"lora_name": "qv-r4", "soon": True}), "unknown field `soon`"),
        (kv_hints({"lora_name": "qv-r4"}, version="2"), "has version '1' here, not '2'"),
    ],
)
async def test_malformed_client_hints_are_refused(
    client: Client, prompts: Sequence[list[int]], hints: dict[str, Any], text: str
) -> None:
    body = {"input_ids": prompts[0], "sampling_params": {"max_new_tokens": 1}}
    answer = await client.post("/generate", {**body, "kv_hints": hints})
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]["message"]


async def test_session_is_alive_from_its_first_turn_until_closed(
    client: Client, prompts: Sequence[list[int]]
) -> None:
    async def sessions(client: Client) -> int:
        return int((await state(client))["pool"]["num_sessions"])

    await client.generate("qv-r4", prompts[0], session_id="first")
    await client.generate("qv-r4", prompts[1], session_id="first")
    await client.chat("demo:all-r4", [{"role": "user", "content": "Hello"}], session_id="other")
    assert await sessions(client) == 2
    for left, name in ((1, "first"), (0, "other"), (0, "never-opened")):
        answer = await client.post("/close_session", {"session_id": name})
        assert answer.status_code == 200, answer.text
        assert await sessions(client) == left


async def test_noise_on_the_control_channel_is_dropped(
    client: Client, noise: Path, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    before = (await state(client))["pool"]["counts"]["messages_dropped"]
    noise.touch()
    asking = [asyncio.create_task(client.generate(name, prompts[0])) for name in NAMES[:3]]
    for _ in range(5):
        await state(client)
    noise.unlink()
    for name, answer in zip(NAMES, await asyncio.gather(*asking), strict=False):
        assert list(answer.token_ids) == reference.generate(name, prompts[0])
    after = (await state(client))["pool"]["counts"]["messages_dropped"]
    assert after - before > 1000


async def test_control_channel_recovers_after_a_peer_restarts(
    client: Client, noise: Path, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    for name in NAMES[:3]:
        running = await client.begin(name, prompts[0], num_tokens=64)
        noise.write_text("die")
        await state(client)  # answered by the restarted peer
        noise.unlink()
        assert list((await running).token_ids) == reference.generate(name, prompts[0], 64)
        answer = await client.generate(name, prompts[1])
        assert list(answer.token_ids) == reference.generate(name, prompts[1])


async def test_drained_server_ends_its_sessions_and_takes_no_new_ones(
    client: Client, server: ServerProcess, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    first = await client.generate("qv-r4", prompts[0], session_id="d1")
    running = await client.begin("mlp-r24", prompts[0], num_tokens=200, session_id="d2")
    assert (await client.get("/ready")).status_code == 200
    begun = (await client.post("/elora/drain", {"refuse_after_s": 0})).json()
    assert begun["refusing"] and begun["num_requests"] == 1 and begun["open_sessions"] >= 2
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/health")).status_code == 200
    for path, body in (
        ("/generate", {"input_ids": prompts[0], "stream": True, "session_id": "d3"}),
        ("/v1/completions", {"model": "demo:qv-r4", "prompt": "hello", "stream": True}),
        ("/v1/chat/completions", {"model": "demo", "messages": [], "session_id": "d3"}),
        ("/open_session", {"capacity_of_str_len": 100}),
    ):
        assert (await client.post(path, body)).status_code == 503, path
    turn = [*prompts[0], *first.token_ids, *prompts[1]]
    second = await client.generate("qv-r4", turn, session_id="d1")
    assert list(second.token_ids) == reference.generate("qv-r4", turn)
    assert second.cached_tokens >= len(prompts[0])
    assert list((await running).token_ids) == reference.generate("mlp-r24", prompts[0], 200)
    drain = ("drain", "--url", server.url)
    assert await asyncio.to_thread(main, [*drain, "--wait", "0"]) == 1
    waiting = asyncio.create_task(asyncio.to_thread(main, [*drain, "--wait", "60"]))
    for session in (f"d{i}" for i in (1, 2)):
        assert (await client.post("/close_session", {"session_id": session})).status_code == 200
    left = (await client.get("/elora/drain")).json()
    assert left["num_requests"] == 0 and left["open_sessions"] == begun["open_sessions"] - 2
    await client.post("/flush_cache", {})  # sessions of other tests
    assert await waiting == 0
    assert (await client.post("/generate", {"text": "x", "session_id": "d1"})).status_code == 200
    assert await asyncio.to_thread(main, [*drain, "--end"]) == 0
    assert (await client.get("/ready")).status_code == 200
    again = await client.generate("qv-r4", prompts[0])
    assert again.token_ids == first.token_ids


async def test_orders_require_the_admin_key_if_one_is_set(
    checkpoint: Path, adapters: dict[str, Path], logs: Path
) -> None:
    given = {"qv-r4": adapters["qv-r4"]}
    flags = ["--elora", *server_flags(checkpoint, given)]
    flags += ["--admin-api-key", ADMIN_KEY, "--api-key", USER_KEY]
    user = {"Authorization": f"Bearer {USER_KEY}"}
    with ServerProcess(flags, log_path=logs / "admin.log") as server:
        async with Client(server.url) as client:
            for key, status in ((None, 401), ("wrong", 401), (USER_KEY, 401), (ADMIN_KEY, 200)):
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                got = await client._http.get("/elora/state", headers=headers)
                assert got.status_code == status
                for what in ORDERS:
                    body = {"lora_name": "qv-r4"}
                    got = await client._http.post(f"/elora/{what}", json=body, headers=headers)
                    assert got.status_code == status, (what, key, got.text)
                    if what == "prefetch" and status == 200:
                        await asyncio.sleep(1)
            http = client._http
            assert (await http.get("/v1/models")).status_code == 401
            assert (await http.get("/v1/models", headers=user)).status_code == 200
            for method in ("GET", "POST", "DELETE"):
                got = await http.request(method, "/elora/drain", headers=user)
                assert got.status_code == 401, method
            for path in ("/load_lora_adapter", "/load_lora_adapter_from_tensors"):
                got = await http.post(path, json={"lora_name": "theirs"}, headers=user)
                assert got.status_code == 401
            for path in ("/server_info", "/get_server_info"):
                info = await http.get(path, headers=user)
                assert info.status_code == 200
                assert ADMIN_KEY not in info.text and USER_KEY not in info.text
            page = await http.get("/elora/ui")  # a browser has no key to send
            policy = page.headers["content-security-policy"]
            assert page.status_code == 200 and "frame-ancestors 'none'" in policy
