"""Each of our methods that overrides one of SGLang's has a method there to override."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def host() -> Any:
    """All modules of ours that have classes of SGLang's kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.lora.backend.base_backend import BaseLoRABackend
        from sglang.srt.lora.lora_manager import LoRAManager

        from sglang_elora import frontend, platforms, srt
        from sglang_elora.config import EloraConfig
        from sglang_elora.srt.install import install, overrides

        for folder in (srt, frontend, platforms):
            for module in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
                importlib.import_module(module.name)
    return SimpleNamespace(
        overrides=overrides,
        preflight=lambda: install.preflight(EloraConfig(enabled=True)),
        backend=BaseLoRABackend,
        manager=LoRAManager,
    )


def test_every_marked_method_overrides_one(host: Any) -> None:
    names = {cls.__name__ for cls in host.overrides.subclasses_of_sglang()}
    assert names >= {"EloraLoRAManager", "EloraTritonBackend", "EloraTreeCore", "EloraCpuPlatform"}
    assert host.overrides.override_problems() == []


def test_every_overriding_method_is_marked(host: Any) -> None:
    classes = host.overrides.subclasses_of_sglang()
    assert host.overrides.unmarked_overrides(classes) == []


@pytest.mark.parametrize(
    ("base", "method", "ours"),
    [
        (
            "backend",
            "init_decode_cuda_graph_batch_info",
            "srt.lora.triton_backend.EloraTritonBackend.init_decode_cuda_graph_batch_info",
        ),
        ("manager", "fetch_new_loras", "srt.lora.lora_manager.EloraLoRAManager.fetch_new_loras"),
    ],
)
def test_preflight_finds_a_method_that_sglang_renamed(
    base: str, method: str, ours: str, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.preflight() == []
    cls = getattr(host, base)
    monkeypatch.setattr(cls, f"{method}_of_now", vars(cls)[method], raising=False)
    monkeypatch.delattr(cls, method)
    (problem,) = host.preflight()
    assert problem.startswith(f"sglang_elora.{ours} overrides nothing")


def test_override_check_handles_each_kind_of_method(host: Any) -> None:
    from sglang.srt.lora.lora_registry import LoRARegistry
    from typing_extensions import override

    class Ours(LoRARegistry):
        """Stands for one of this package."""

        __module__ = "sglang_elora.srt.made_up"

        @override
        async def acquire(self, lora_name: Any) -> Any: ...

        async def release(self, lora_id: Any) -> None: ...

        async def of_our_own(self) -> None: ...

    class Derived(Ours):
        """A base of ours does not count as one of SGLang's."""

        __module__ = "sglang_elora.srt.made_up"

        async def of_our_own(self) -> None: ...

    unmarked = host.overrides.unmarked_overrides([Ours, Derived])
    assert [name.rpartition(".")[2] for name in unmarked] == ["release"]
