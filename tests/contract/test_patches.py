"""Every patch of the folder fits the installed wheel and does what its ledger row says.

Patches are applied in a process of their own (this file, run as a script), so
that SGLang stays as the wheel has it for the other tests.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from array import array
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.config import SGLANG_PIN
from sglang_elora.srt.install.patching import (
    Patch,
    apply_patch,
    is_applied,
    load_patches,
    patched_source,
    preflight,
)
from sglang_elora.tree import adapter_of, namespace_of

FOLDER = Path(__file__).parents[2] / "patches"
PATCHES = load_patches(FOLDER)
NAMESPACE = "01-cache-namespace.patch"

CHANGED = {  # patch -> module and functions
    NAMESPACE: ("srt.managers.schedule_batch", ["Req.__init__", "Req.build_rebootstrap_payload"]),
    "02-lang-api.patch": ("lang.api", ["gen", "gen_int", "gen_string", "select"]),
    "03-lang-ir.patch": (
        "lang.ir",
        [
            "SglFunction.run_batch",
            "SglGen.__init__",
            "SglSelect.__init__",
            "SglCommitLazy.__init__",
        ],
    ),
    "04-lang-interpreter.patch": (
        "lang.interpreter",
        [
            "run_program",
            "run_program_batch",
            "cache_program",
            "StreamExecutor.__init__",
            "StreamExecutor.get_var",
            "StreamExecutor.fork",
            "StreamExecutor._thread_worker_func",
            "StreamExecutor._execute",
            "ProgramState.fork",
        ],
    ),
    "05-lang-tracer.patch": (
        "lang.tracer",
        [
            "extract_prefix_by_tracing",
            "trace_program",
            "TracerProgramState.__init__",
            "TracerProgramState.fork",
        ],
    ),
    "06-lang-base-backend.patch": (
        "lang.backend.base_backend",
        ["BaseBackend.__init__", "BaseBackend.cache_prefix"],
    ),
    "07-lang-runtime-endpoint.patch": (
        "lang.backend.runtime_endpoint",
        [
            "RuntimeEndpoint.__init__",
            "RuntimeEndpoint.cache_prefix",
            "RuntimeEndpoint.generate_stream",
            "RuntimeEndpoint._add_images",
            "Runtime.cache_prefix",
            "Runtime.async_generate",
        ],
    ),
}

# Small alphabets make concatenations meet; the rest is what a caller may try on purpose.
IDS = ("0123456789abcdef" * 2, "fedcba9876543210" * 2)  # as SGLang draws them
ADAPTERS = (None, "a", "b", "ab", "ba", "aab", *IDS)
KEYS = (
    None,
    *("".join(key) for n in range(3) for key in itertools.product("ab/", repeat=n)),
    *("lora/a/", "lora/a", "lora//a", "base/a", "base/a/", "lora/a/a", "base/", "lora/"),
    *("|elastic_ep_size=2", f"x{IDS[0]}", f"lora//{IDS[0]}"),
)


def _source(patch: Patch) -> Path:
    """Where the wheel has the target, without importing it."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1] / patch.target


each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)


# The diffs.


@each_patch
def test_patch_applier_and_git_apply_agree(patch: Patch, tmp_path: Path) -> None:
    target = tmp_path / patch.target
    target.parent.mkdir(parents=True)
    shutil.copyfile(_source(patch), target)
    expected = patched_source(patch, target.read_text(encoding="utf-8"))
    _run(tmp_path, "git", "apply", "--check", "-p1", str(FOLDER / patch.name))
    _run(tmp_path, "git", "apply", "-p1", str(FOLDER / patch.name))
    assert target.read_text(encoding="utf-8") == expected


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# The ledger.


@cache
def _ledger() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def test_patch_ledger_has_one_row_per_patch() -> None:
    rows = re.findall(r"^\| `([^`]+\.patch)` \| `([^`]+)` \|", _ledger(), re.MULTILINE)
    assert rows == [(patch.name, patch.target) for patch in PATCHES]


@each_patch
def test_patch_ledger_row_fills_every_column(patch: Patch) -> None:
    section = _ledger().partition(f"\n## {patch.name}\n")[2].partition("\n## ")[0]
    for heading in ("Why", "Why not a rung above", "Upstream pull request", "Remove when"):
        assert f"\n### {heading}\n" in section, heading


def test_patch_file_names_are_numbered_without_a_gap() -> None:
    numbers = [re.fullmatch(r"(\d\d)-[a-z0-9-]+\.patch", patch.name) for patch in PATCHES]
    assert [match and int(match[1]) for match in numbers] == list(range(1, len(PATCHES) + 1))


def test_patch_ledger_names_the_installed_sglang_version() -> None:
    assert version("sglang") == SGLANG_PIN
    assert f"sglang=={SGLANG_PIN}" in _ledger()


def test_installed_package_has_the_same_patches() -> None:
    pytest.importorskip("sglang_elora.patches", reason="a checkout on sys.path, not installed")
    assert load_patches() == PATCHES


# In a process.


@pytest.fixture(scope="module")
def seen() -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@each_patch
def test_patches_pass_preflight_apply_and_verify(patch: Patch, seen: Any) -> None:
    assert seen["patches"][patch.name] == {
        "problems": [],
        "applied before": False,
        "again": [],
        "applied after": True,
    }


def test_patches_change_the_listed_functions(seen: Any) -> None:
    assert seen["changed"] == {
        name: [f"sglang.{module}.{function}" for function in functions]
        for name, (module, functions) in CHANGED.items()
    }


def test_frontend_patches_are_not_applied_in_the_server() -> None:
    assert {patch.name for patch in PATCHES if patch.when == "--elora"} == {NAMESPACE}
    assert {patch.when for patch in PATCHES} == {"--elora", "sglang_elora.lang"}


def test_patched_classes_and_functions_keep_their_identity(seen: Any) -> None:
    assert seen["same objects"]


def test_stock_sglang_namespaces_collide(seen: Any) -> None:
    """The reason for the patch; if this fails, upstream has fixed it and the patch can go."""
    shared = _sharing(seen["stock"])
    assert {(None, "ab"), ("ab", None), ("b", "a")} <= set(map(tuple, shared["ab"]))


def test_no_two_requests_share_a_namespace(seen: Any) -> None:
    for namespace, pairs in _sharing(seen["patched"]).items():
        adapters = {adapter for adapter, _ in pairs}
        assert len(adapters) == 1, (namespace, pairs)
        # For an adapter, an absent and an empty key are the same, as in stock.
        assert len({key or None for _, key in pairs}) == 1, (namespace, pairs)


def test_requests_without_adapter_and_key_stay_without_namespace(seen: Any) -> None:
    """Hashes of KV events and of storage depend on whether there is a namespace."""
    assert seen["stock"].keys() == seen["patched"].keys()
    for pair, namespace in seen["stock"].items():
        assert (namespace is None) == (seen["patched"][pair] is None), pair


def test_namespace_keeps_the_callers_extra_key(seen: Any) -> None:
    assert seen["caller keys"] == [json.loads(pair)[1] for pair in seen["patched"]]


def test_request_resent_to_a_prefill_server_is_namespaced_once(seen: Any) -> None:
    """Upstream sends the composed key, which the receiver composes again."""
    for pair, key in seen["rebootstrap keys"].items():
        assert key == json.loads(pair)[1]


def test_adapter_ids_have_no_slash(seen: Any) -> None:
    """What makes ``lora/<key>/<id>`` unambiguous."""
    for adapter_id in seen["adapter ids"]:
        assert re.fullmatch(r"[0-9a-f]{32}", adapter_id), adapter_id


def test_kv_events_name_the_requests_adapter_or_none(seen: Any) -> None:
    """SGLang looks for the id at the end of the namespace."""
    for pair, name in seen["names in events"].items():
        adapter, _ = json.loads(pair)
        assert name == (f"name of {adapter}" if adapter in IDS else None), pair


def test_tree_reads_the_adapter_id_from_a_namespace(seen: Any) -> None:
    for pair, namespace in seen["patched"].items():
        adapter, key = json.loads(pair)
        assert adapter_of(namespace) == adapter
        assert adapter is None or namespace_of(adapter, key or "") == namespace


def test_no_two_generated_requests_share_a_namespace(seen: Any) -> None:
    assert seen["property"] == "holds"


def _sharing(namespaces: dict[str, str | None]) -> dict[str | None, list[Any]]:
    sharing: dict[str | None, list[Any]] = defaultdict(list)
    for pair, namespace in namespaces.items():
        sharing[namespace].append(json.loads(pair))
    return sharing


# The script.


def _search_for_a_shared_namespace(request: Callable[[str | None, str | None], Any]) -> str:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    pieces = st.sampled_from(["lora", "base", "/", "a", *IDS])  # of which namespaces are made
    keys = st.none() | st.lists(pieces, max_size=6).map("".join) | st.text(max_size=4)
    pairs = st.tuples(st.sampled_from([None, *IDS]), keys)

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(st.lists(pairs, min_size=20, max_size=20))
    def search(some: list[tuple[str | None, str | None]]) -> None:
        owners: dict[str | None, tuple[str | None, str]] = {}
        for adapter, key in some:
            namespace = request(adapter, key).extra_key
            assert owners.setdefault(namespace, (adapter, key or "")) == (adapter, key or "")

    search()
    return "holds"


def _observe() -> dict[str, Any]:
    from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

    ensure_torchvision_importable()
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.managers import schedule_batch
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.events import LoRANameTable
    from sglang.srt.sampling.sampling_params import SamplingParams

    def request(adapter: str | None, key: str | None) -> Any:
        tokens = array("q", [1])
        return Req("rid", "", tokens, SamplingParams(), lora_id=adapter, extra_key=key)

    def requests() -> dict[str, Any]:
        return {
            json.dumps((adapter, key)): request(adapter, key)
            for adapter, key in itertools.product(ADAPTERS, KEYS)
        }

    functions = Req.__init__, Req.build_rebootstrap_payload
    stock = requests()
    verdicts, changed = {}, {}
    for patch in PATCHES:
        verdict = verdicts[patch.name] = {
            "problems": preflight(patch),
            "applied before": is_applied(patch),
        }
        changed[patch.name] = apply_patch(patch)
        verdict["again"] = list(apply_patch(patch))
        verdict["applied after"] = is_applied(patch)
    patched = requests()
    names = LoRANameTable()
    for adapter in IDS:
        names.register(lora_id=adapter, lora_name=f"name of {adapter}")
    return {
        "property": _search_for_a_shared_namespace(request),
        "names in events": {
            pair: names.resolve(request.extra_key) for pair, request in patched.items()
        },
        "patches": verdicts,
        "changed": changed,
        "same objects": Req is schedule_batch.Req
        and functions == (Req.__init__, Req.build_rebootstrap_payload),
        "stock": {pair: request.extra_key for pair, request in stock.items()},
        "patched": {pair: request.extra_key for pair, request in patched.items()},
        "caller keys": [request.caller_extra_key for request in patched.values()],
        "rebootstrap keys": {
            pair: request.build_rebootstrap_payload()["extra_key"]
            for pair, request in patched.items()
        },
        "adapter ids": [LoRARef().lora_id, LoRARef.deterministic_id("org/name", "/a/path")],
    }


if __name__ == "__main__":
    print(json.dumps(_observe()))
