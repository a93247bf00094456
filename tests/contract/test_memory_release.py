"""A scheduler survives a memory release that it cannot carry out, and the resume after it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def hooks() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.tokenizer import memory_release
    return memory_release


@pytest.mark.parametrize("is_idle", [False, True])
def test_busy_scheduler_releases_nothing_and_resumes_nothing(hooks: Any, is_idle: bool) -> None:
    calls: list[str] = []
    updater = SimpleNamespace(
        scheduler=None, offload_tags=set(), is_fully_idle=lambda ignore_waiting: is_idle
    )

    def release(self: Any, recv_req: Any) -> str:
        calls.append("release")
        self.offload_tags.update(recv_req.tags)
        return "released"

    def resume(self: Any, recv_req: Any) -> str:
        calls.append("resume")
        self.offload_tags.difference_update(recv_req.tags)
        return "resumed"

    request = SimpleNamespace(tags=["weights"])
    hooks.release_if_idle(release, updater, request)
    for _ in range(2):
        hooks.resume_if_released(resume, updater, request)
    assert calls == (["release", "resume"] if is_idle else [])
    assert not updater.offload_tags
