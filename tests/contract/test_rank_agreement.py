"""Two tensor-parallel ranks in one process: an event on one of them has the same result on both.

Each rank has a pool, a tree, a host tier and a swapper of its own and runs in a thread of its own;
all-reduces are exchanged between them, as the process group would do.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_elora.pages import AdapterImage, LayerPlan, ModuleShape
from tests.harness.swapper_world import HEAD_DIM, AdapterSource, SwapperWorld, adapter_id

SLOTS, RANK = 64, 8
WIDTH = SLOTS * HEAD_DIM // RANK
LIVENESS_S = 20  # a rank that waits for this long hangs

Read = Callable[[], AdapterImage]


class Group:
    """An all-reduce between two threads. ``num_calls`` are those of each rank."""

    def __init__(self) -> None:
        self.num_calls = [0, 0]
        self._barrier = threading.Barrier(2, timeout=LIVENESS_S)
        self._given: list[Any] = [None, None]

    def all_reduce(self, rank: int, tensor: torch.Tensor, _: Any) -> None:
        self.num_calls[rank] += 1
        self._given[rank] = tensor.clone()
        self._barrier.wait()
        least = torch.minimum(*self._given)
        self._barrier.wait()
        tensor.copy_(least)


class Ranks:
    """Both ranks. ``run`` does the same on each of them at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_slots: int = 8 * SLOTS) -> None:
        from sglang_elora.srt.scheduler import swapper

        self.group, self.worlds, self.sent = Group(), [], ([], [])
        self._threads = ThreadPoolExecutor(2)
        monkeypatch.setattr(
            swapper, "_make_abort_req", lambda req, finished_reason: finished_reason
        )
        for rank in range(2):
            made = SwapperWorld(num_slots, num_adapters=6, adapter_slots=SLOTS)
            made.cache.tree.tp_world_size = 2
            made.cache.tree._all_reduce = lambda tensor, op, rank=rank: self.group.all_reduce(
                rank, tensor, op
            )
            made.measured.refresh = lambda: False  # type: ignore[method-assign]
            made.scheduler._release_aborted_request = lambda req: None
            made.scheduler.ipc_channels = SimpleNamespace(
                send_to_tokenizer=SimpleNamespace(
                    send_output=lambda answer, req, rank=rank: self.sent[rank].append(
                        answer["message"]
                    )
                )
            )
            self.worlds.append(made)

    def run(self, action: Callable[[SwapperWorld], Any]) -> list[Any]:
        futures = [self._threads.submit(action, made) for made in self.worlds]
        return [future.result(timeout=2 * LIVENESS_S) for future in futures]

    def step(self, *, is_busy: bool = True) -> int:
        """All-reduces of the step, which are as many on both ranks, and end alike."""
        before = self.group.num_calls[0]
        self.run(lambda made: made.step(is_busy=is_busy))
        self.check()
        return self.group.num_calls[0] - before

    def arrive(self, name: str) -> None:
        self.run(lambda made: made.arrive(name))

    def know(self, name: str, reads: tuple[Read, Read]) -> None:
        """An adapter with a file, which each rank reads in its own way."""
        for made, read in zip(self.worlds, reads, strict=True):
            image = made.host.get(adapter_id(0))
            source = AdapterSource(name, name, image.layout, image.nbytes, False, read=read)
            made.residency.register(source)

    def step_until(self, is_over: Callable[[SwapperWorld], bool]) -> None:
        for _ in range(2000):
            self.step()
            over = self.run(is_over)
            assert over[0] == over[1]
            if over[0]:
                return
            threading.Event().wait(0.001)
        raise AssertionError("never over")

    def check(self) -> None:
        states = [
            (
                [req.lora_id for req in made.waiting],
                [adapter.resident for adapter in made.residency.adapter_table],
                list(made.residency.copies),
                made.host.reading,
                made.cache.allocator.available_size(),
                len(self.sent[rank]),
                self.group.num_calls[rank],
            )
            for rank, made in enumerate(self.worlds)
        ]
        assert states[0] == states[1]
        for made in self.worlds:
            made.check()

    def close(self) -> None:
        self._threads.shutdown()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    made = Ranks(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def image(ranks: Ranks) -> AdapterImage:
    return ranks.worlds[0].host.get(adapter_id(0))


def is_idle(made: SwapperWorld) -> bool:
    return not (made.host.reading or made.residency.copies)


def test_file_replaced_between_reads_of_two_ranks_fails_on_both(
    ranks: Ranks, image: AdapterImage
) -> None:
    contents = (["old", "old", "old"], ["old", "new", "old"])  # what each rank reads, in turn

    def reader(rank: int) -> Read:
        return lambda chunks: replace(image, version=contents[rank].pop(0))

    ranks.know("a", (reader(0), reader(1)))
    ranks.arrive("a")
    ranks.step_until(lambda made: made.is_resident("a") and is_idle(made))
    ranks.run(lambda made: (made.waiting.clear(), made.step()))
    ranks.run(lambda made: (made.cache.evict(SLOTS), made.host.drop("a")))
    ranks.arrive("a")
    ranks.step_until(lambda made: not made.waiting)
    assert [len(texts) for texts in ranks.sent] == [1, 1]
    assert all("replaced while it was being read" in texts[0] for texts in ranks.sent)
    assert not any(made.is_resident("a") or "a" in made.host for made in ranks.worlds)
    ranks.arrive("a")  # the file is unchanged
    ranks.step_until(lambda made: made.is_resident("a") and is_idle(made))


def test_file_replaced_during_first_reads_fails_its_requests_on_both_ranks(
    ranks: Ranks, image: AdapterImage
) -> None:
    contents = (["old", "new"], ["new", "new"])

    def reader(rank: int) -> Read:
        return lambda chunks: replace(image, version=contents[rank].pop(0))

    ranks.know("a", (reader(0), reader(1)))
    ranks.arrive("a")
    ranks.step_until(lambda made: not made.waiting)
    assert all("replaced while it was being read" in texts[0] for texts in ranks.sent)
    assert not any("a" in made.host for made in ranks.worlds)
    ranks.arrive("a")
    ranks.step_until(lambda made: made.is_resident("a") and is_idle(made))


def test_file_changed_on_both_ranks_fails_on_both(ranks: Ranks, image: AdapterImage) -> None:
    contents = (["old", "new"], ["old", "new"])

    def reader(rank: int) -> Read:
        return lambda chunks: replace(image, version=contents[rank].pop(0))

    ranks.know("a", (reader(0), reader(1)))
    ranks.arrive("a")
    ranks.step_until(lambda made: made.is_resident("a") and is_idle(made))
    ranks.run(lambda made: (made.waiting.clear(), made.step()))
    ranks.run(lambda made: (made.cache.evict(SLOTS), made.host.drop("a")))
    ranks.arrive("a")
    ranks.step_until(lambda made: not made.waiting)
    assert all("has changed since it was loaded" in texts[0] for texts in ranks.sent)


def test_failed_read_is_settled_after_the_slower_rank_without_blocking(
    ranks: Ranks, image: AdapterImage
) -> None:
    may_end = threading.Event()

    def broken(chunks: object) -> AdapterImage:
        raise OSError("no such file")

    def slow(chunks: object) -> AdapterImage:
        assert may_end.wait(2 * LIVENESS_S)
        return image

    ranks.know("a", (broken, slow))
    ranks.arrive("a")
    for _ in range(50):
        ranks.step()  # returns, though the thread of the other rank has not ended
        threading.Event().wait(0.001)
    assert not may_end.is_set() and all(made.host.reading == ("a",) for made in ranks.worlds)
    may_end.set()
    ranks.step_until(lambda made: not made.waiting)
    assert "no such file" in ranks.sent[0][0] and "another rank" in ranks.sent[1][0]


def fail_to_queue(made: SwapperWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(made.residency.planes, "write", fail)


@pytest.mark.parametrize("is_first", [True, False])
def test_copy_that_one_rank_cannot_queue_is_undone_on_both(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """Also after the ranks agreed on an earlier copy in the same step."""
    if not is_first:
        ranks.arrive(adapter_id(1))
        ranks.step()
    fail_to_queue(ranks.worlds[1], monkeypatch)
    ranks.arrive(adapter_id(0))
    for _ in range(2):
        ranks.step()
    left = [] if is_first else [adapter_id(1)]
    assert all([req.lora_id for req in made.waiting] == left for made in ranks.worlds)
    assert "another rank" in ranks.sent[0][0] and "out of memory" in ranks.sent[1][0]
    assert not any(made.is_resident(adapter_id(0)) for made in ranks.worlds)


def test_step_does_at_most_one_all_reduce(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is started after the step's all-reduce waits for that of the next step."""
    from sglang_elora.swapper.adapter_copy import AdapterCopy, Copied

    monkeypatch.setattr(AdapterCopy, "code", Copied.UNDER_WAY)
    adder: Any = SimpleNamespace(
        can_run_list=[], running_batch=SimpleNamespace(is_empty=lambda: True)
    )

    def may_run(name: str) -> bool:
        first, second = ranks.run(
            lambda made: made.swapper.is_hidden(made.residency.copies[name], made.waiting[0], adder)
        )
        assert first == second
        return bool(first)

    assert ranks.step() == 0, "with nothing under way there is nothing to agree on"
    ranks.arrive(adapter_id(0))
    assert ranks.step() == 1
    assert may_run(adapter_id(0)), "it was agreed on in the step that started it"
    ranks.arrive(adapter_id(1))
    assert ranks.step() == 1
    assert not may_run(adapter_id(1))
    assert ranks.step() == 1
    assert may_run(adapter_id(1))


# Loading while the server runs: headers are read by each rank


def write_adapter(folder: Path, *, alpha: int = 16, rank: int = RANK) -> None:
    folder.mkdir(exist_ok=True)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": ["o_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    tensors = {
        f"{path}A.weight": torch.ones(rank, WIDTH),
        f"{path}B.weight": torch.ones(WIDTH, rank),
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def manager_of(made: SwapperWorld) -> Any:
    """SGLang's loading and ours, over a rank's pool and without a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.lora.lora_manager import EloraLoRAManager

    manager: Any = object.__new__(EloraLoRAManager)
    manager.residency = made.residency
    manager.configs, manager.loras, manager.lora_refs = {}, {}, {}
    manager.num_pinned_loras, manager.max_loras_per_batch = 0, 100
    manager.attn_dp_enabled = False
    manager.device, manager.dtype = torch.device("cpu"), torch.float32
    manager.base_hf_config = SimpleNamespace(vocab_size=1000)
    found = {ModuleShape("o_proj", WIDTH, (WIDTH,)): [0]}
    manager.memory_pool = SimpleNamespace(
        plan=LayerPlan.build(found, (), model_layers=1, pool_layers=1),
        can_support=lambda config: True,
        remove_lora=manager._retire,
    )
    manager._read_image = lambda *_: made.host.get(adapter_id(0))
    return manager


def load(ranks: Ranks, folder: Path, between: Callable[[], None]) -> list[Any]:
    """Load on rank 0; once it waits for rank 1, call ``between``, then load on rank 1."""
    from sglang.srt.lora.lora_registry import LoRARef

    ref = LoRARef(lora_id="new", lora_name="new", lora_path=str(folder), pinned=False)
    managers = [manager_of(made) for made in ranks.worlds]
    first = ranks._threads.submit(managers[0].load_lora_adapter, ref)
    while not ranks.group.num_calls[0] and not first.done():
        threading.Event().wait(0.001)
    between()
    second = ranks._threads.submit(managers[1].load_lora_adapter, ref)
    results = [first.result(2 * LIVENESS_S), second.result(2 * LIVENESS_S)]
    assert len({("new" in manager.configs, *manager.lora_refs) for manager in managers}) == 1
    assert len({"new" in made.residency.adapter_table for made in ranks.worlds}) == 1
    ranks.check()
    return results


def test_load_api_registers_and_reads_the_adapter_on_both_ranks(
    ranks: Ranks, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a")
    results = load(ranks, tmp_path / "a", lambda: None)
    assert [result.success for result in results] == [True, True]
    assert all(made.host.reading == ("new",) for made in ranks.worlds)
    ranks.step_until(is_idle)
    assert all("new" in made.host for made in ranks.worlds)


@pytest.mark.parametrize("change", ["gone", "rank", "alpha"])
def test_load_api_fails_on_both_ranks_if_files_change_between_them(
    ranks: Ranks, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "a"
    write_adapter(folder)

    def replace_files() -> None:
        if change == "gone":
            (folder / "adapter_model.safetensors").unlink()
        else:
            write_adapter(folder, **{change: 4})

    results = load(ranks, folder, replace_files)
    assert [result.success for result in results] == [False, False]
    assert "another rank failed" in results[0].error_message or change != "gone"
    assert "replaced meanwhile" in results[0].error_message or change == "gone"
    assert not any("new" in made.residency.adapter_table for made in ranks.worlds)
    assert all(made.host.reading == () for made in ranks.worlds)
    ranks.arrive(adapter_id(0))
    ranks.step_until(lambda made: made.is_resident(adapter_id(0)) and is_idle(made))


@pytest.mark.parametrize("alpha", [16, 4])
def test_launch_adapters_must_be_equal_on_all_ranks(
    ranks: Ranks, tmp_path: Path, alpha: int
) -> None:
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_registry import LoRARef

    ref = LoRARef(lora_id="new", lora_name="new", lora_path=str(tmp_path / "a"), pinned=False)
    managers: dict[int, Any] = {}
    for made, read_alpha in zip(ranks.worlds, (16, alpha), strict=True):
        write_adapter(tmp_path / "a", alpha=read_alpha)
        manager = managers[id(made)] = manager_of(made)
        manager.lora_refs = {"new": ref}
        manager.configs = {"new": LoRAConfig(str(tmp_path / "a"))}
        manager.lora_backend = SimpleNamespace(warm_up=lambda planes: None)

    def bind(made: SwapperWorld) -> str:
        try:
            managers[id(made)].bind(made.residency, made.measured)
        except ValueError as error:
            return str(error)
        return ""

    first, second = ranks.run(bind)
    assert first == second and ("were replaced while" in first) == (alpha != 16)


def test_is_hidden_uses_sglangs_prefill_graph_rule(ranks: Ranks) -> None:
    made = ranks.worlds[0]
    manager = manager_of(made)
    manager.lora_backend = SimpleNamespace(
        warm_up=lambda planes: None, prefill_cuda_graph_max_bs=2, prefill_cuda_graph_max_tokens=60
    )
    ranks.worlds[0].cache.tree.tp_world_size = 1
    manager.bind(made.residency, made.measured)
    rule = made.residency.replays_prefill_graph
    assert [rule(2, 60), rule(3, 60), rule(2, 61)] == [True, False, False]
    manager.lora_backend.prefill_cuda_graph_max_bs = None  # no prefill graphs were captured
    assert not rule(1, 1)
