"""Real servers for the end-to-end tests, started once and shared."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from sglang_elora.testbed import server as server_module
from sglang_elora.testbed.adapters import make_adapters
from sglang_elora.testbed.server import ServerProcess, python_module
from tests.harness import forked
from tests.harness.adapter_specs import SPECS
from tests.harness.bad_adapters import make_bad_adapters
from tests.harness.client import Client
from tests.harness.plugin_packages import install_plugin
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: Sequence[pytest.CacheEntry]) -> None:
    """Mark every test of this folder, also if other folders are collected."""
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker("e2e")


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Check, after all other fixtures: no process that this run started is alive."""
    yield
    # Helpers of this process, which end with it.
    ours = ("torch_shm_manager", forked.FORKSERVER, "multiprocessing.resource_tracker")
    left = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    left = [command for command in left if not any(name in " ".join(command) for name in ours)]
    assert not left, left


def _forked_or_spawned(command: Sequence[str], **options: Any) -> Any:
    is_module = command[1] == "-m"
    return (forked.ForkedServer if is_module else subprocess.Popen)(command, **options)


@pytest.fixture(scope="session", autouse=True)
def forked_start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers are forked from a process that has their libraries, and fork their scheduler and
    detokenizer, which SGLang would spawn.

    Each process of its own imports everything again: most of the processor time of a start. Tests
    with ``spawned_start``, and ``make demo``, start a server as users do.
    """
    folder, given = tmp_path_factory.mktemp("forked-start"), os.environ.get("PYTHONPATH", "")
    install_plugin(folder, "forked_start")
    forked.ensure_started()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), given))))
        patch.setattr(server_module, "Popen", _forked_or_spawned)
        yield


@pytest.fixture
def spawned_start(forked_start: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers spawn all their processes, as they do for users."""
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(server_module, "Popen", subprocess.Popen)


@pytest.fixture(scope="session")
def adapters(checkpoint: Path, models: Path) -> dict[str, Path]:
    return make_adapters(checkpoint, models / "adapters", SPECS)


@pytest.fixture(scope="session")
def reference(checkpoint: Path, adapters: dict[str, Path]) -> Reference:
    return Reference(checkpoint, adapters)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def prompts(reference: Reference) -> Sequence[list[int]]:
    """Prompts of different lengths, as token ids."""
    texts = (
        "The train to the harbour leaves at noon",
        "Please compare the two letters and tell me which one was written first, " * 6,
        "A recipe for soup:",
    )
    return [reference.tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``elora_server`` watches; empty at its start."""
    return tmp_path_factory.mktemp("adapter-dir")


@pytest.fixture(scope="session")
def elora_server(
    checkpoint: Path, adapters: dict[str, Path], logs: Path, models: Path, adapter_dir: Path
) -> Iterator[ServerProcess]:
    """ELORA on, all adapters given at start, and bad ones of every kind among them."""
    bad = make_bad_adapters(adapters["attention-r8"], models / "bad")
    given = {**adapters, **bad, "missing": models / "no-such-adapter"}
    flags = ["--elora", "--elora-check", *server_flags(checkpoint, given)]
    flags += ["--elora-adapter-dir", str(adapter_dir)]
    with ServerProcess(flags, log_path=logs / "elora.log") as server:
        yield server


@pytest.fixture(scope="session")
def server(elora_server: ServerProcess) -> ServerProcess:
    """The server of the fixture ``client``; many modules start one of their own."""
    return elora_server


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[Client]:
    """Requests to the module's server."""
    async with Client(server.url) as client:
        yield client


@pytest.fixture(scope="session")
def stock_server(
    checkpoint: Path, adapters: dict[str, Path], logs: Path
) -> Iterator[ServerProcess]:
    """Stock SGLang, with this package installed but not enabled."""
    stock = {name: adapters[name] for name in ("all-r64", "attention-r8")}
    with ServerProcess(
        server_flags(checkpoint, stock),
        log_path=logs / "stock.log",
        program=python_module("sglang.launch_server"),
    ) as server:
        yield server
