"""The benchmark's driver over each API, on the servers that the other tests use."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from sglang_elora.bench.endpoint import APIS, Api, EndpointError, find
from sglang_elora.commands.cli import main
from sglang_elora.testbed.server import ServerProcess

ADAPTERS = ("attention-r8", "all-r64")  # that both servers have


def bench(server: ServerProcess, api: Api, out: Path) -> list[dict]:  # type: ignore[type-arg]
    """Rows of chats of 2 s."""
    options = ["--api", api, "--workloads", "chat", "--runs", "1", "--duration", "2", "--load", "1"]
    options += ["--adapter-names", *ADAPTERS, "--out", str(out)]
    assert main(["bench", "--url", server.url, *options]) == 0
    return [json.loads(path.read_text()) for path in out.glob("chat-*.json")]


@pytest.mark.parametrize("api", APIS)
def test_bench_measures_elora_over_each_api(
    elora_server: ServerProcess, tmp_path: Path, api: Api
) -> None:
    (row,) = bench(elora_server, api, tmp_path)
    assert row["side"] == f"demo ({api})"
    assert row["records"]
    for record in row["records"]:
        assert record["error"] is None
        assert record["adapter"] in ADAPTERS
        assert record["sent_s"] < record["first_s"] <= record["last_s"]
        assert 0 <= record["num_cached"] < record["num_prompt"]
    assert row["elora_after"] is not None
    assert row["pool"], "the pool was looked at"
    for sample in row["pool"]:
        assert sample["invalid_kv"] == 0
        assert sum(sample["uses"].values()) == sample["slots"]
    for name in ("report.html", "tables.txt", "latency.png", "pool.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_bench_measures_stock_sglang(stock_server: ServerProcess, tmp_path: Path) -> None:
    (row,) = bench(stock_server, "openai", tmp_path)
    assert all(record["error"] is None for record in row["records"])
    assert row["elora_after"] is None
    assert row["pool"] and all(sample["invalid_kv"] is None for sample in row["pool"])


def test_bench_refuses_names_that_are_not_served(elora_server: ServerProcess) -> None:
    with pytest.raises(EndpointError, match="does not serve adapter nobody, but"):
        find(elora_server.url, "openai", None, ["nobody"])
    with pytest.raises(EndpointError, match="does not serve model 'other', but demo"):
        find(elora_server.url, "openai", "other", None)


def test_bench_names_a_missing_server_or_wrong_url(
    elora_server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url, text in (
        ("http://127.0.0.1:1", "no server at http://127.0.0.1:1"),
        (f"{elora_server.url}/v1", "is the root of a server"),
    ):
        assert main(["bench", "--url", url, "--out", str(tmp_path)]) == 1
        assert text in capsys.readouterr().err
    assert httpx.get(f"{elora_server.url}/health", trust_env=False).status_code == 200
