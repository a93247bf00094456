"""The example of two replicas and SGLang's router: requests of one key go to one replica."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.testbed.adapters import demo_adapters, make_adapters

pytest.importorskip("sglang_router", reason="needs the extra [router]")

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples/two_replicas/run.py"))
NUM_ADAPTERS, NUM_TURNS = 12, 3
"""An adapter per session. The router assigns keys at random while it is idle, so few of them might
all be on one replica."""


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, models: Path) -> dict[str, Path]:
    return make_adapters(checkpoint, models / "of-replicas", demo_adapters(NUM_ADAPTERS))


@pytest.fixture(scope="module")
def urls(checkpoint: Path, adapters: dict[str, Path], logs: Path) -> Iterator[list[str]]:
    replica = EXAMPLE["replica"]
    with (
        replica(checkpoint, adapters, logs / "replica-1.log") as one,
        replica(checkpoint, adapters, logs / "replica-2.log") as two,
    ):
        yield [one.url, two.url]


@pytest.mark.parametrize("name", ["session", "adapter", "round_robin"])
def test_router_keeps_requests_of_one_key_on_one_replica(
    name: str, urls: list[str], adapters: dict[str, Path], logs: Path
) -> None:
    plan = (list(adapters), NUM_ADAPTERS, NUM_TURNS)
    did: list[dict[str, Any]]
    did, mean_s = EXAMPLE["play"](urls, EXAMPLE["ROUTES"][name], *plan, logs / f"{name}.log")
    assert mean_s > 0
    assert sum(replica["requests"] for replica in did) == NUM_ADAPTERS * NUM_TURNS
    places = [replica["adapters"] for replica in did]
    if name == "round_robin":
        assert sum(places) > NUM_ADAPTERS, "adapters are on both"
    else:
        assert sum(places) == NUM_ADAPTERS and all(places)
        assert [replica["adapter_loads"] for replica in did] == places
        assert [replica["requests"] for replica in did] == [NUM_TURNS * n for n in places]
        assert all(replica["cached_tokens"] > 0 for replica in did)
