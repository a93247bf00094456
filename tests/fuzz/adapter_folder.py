"""Searches for adapter folders that the check of adapters neither serves nor refuses.

``python -m tests.fuzz.adapter_folder --seconds 60 [corpus folder]`` makes folders as strangers may
send them, led by what the check's code did with earlier ones. It ends with an error at the first
folder that raises anything but a refusal, takes too long or too much memory, runs code, or is
refused in a text that names no file or would spoil a terminal. Given a file instead of a folder, it
makes and checks that one input.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import atheris
import torch

from tests.harness.strange_folders import HIDDEN, LAYERS, SIZES, VOCAB, build, seeds

with atheris.instrument_imports(include=["sglang_elora.adapters"]):
    from sglang_elora.adapters import (
        AdapterError,
        BaseShapes,
        check_adapter,
        read_adapter,
        served_modules,
    )
    from sglang_elora.adapters.base_shapes import ModuleShape

SECONDS_EACH = 5.0  # of the processor: an endless wait hits libFuzzer's own limit
BYTES_EACH = 512 << 20
CHARS_EACH = 10_000
COUNTS: Counter[str] = Counter()

KNOWN = BaseShapes(
    modules={
        "model.embed_tokens": ModuleShape(VOCAB, HIDDEN, is_embedding=True),
        "lm_head": ModuleShape(HIDDEN, VOCAB),
        **{
            f"model.layers.{layer}.self_attn.{name}": ModuleShape(HIDDEN, size)
            for layer in range(LAYERS)
            for name, size in SIZES.items()
        },
    },
    vocab_size=VOCAB,
    num_layers=LAYERS,
)
UNKNOWN = BaseShapes.unknown("fuzzed without a base")

_CODE_EVENTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir"),
    *("subprocess.Popen", "socket.connect", "pickle.find_class", "shutil.rmtree", "os.rmdir"),
)


def check_one(data: bytes) -> bool:
    """Make the folder of these bytes, and see that the check serves it or refuses it properly.

    Returns:
        Whether it was accepted.

    Raises:
        AssertionError: It did not keep to its contract. Any other error was the check's own.
    """
    folder = _SCRATCH / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    build(data, folder)
    base = UNKNOWN if data and data[0] & 4 else KNOWN
    with _Watched() as watched:
        refusal = _refusal(folder, base)
    watched.assert_kept()
    if refusal is None:
        return True
    text = str(refusal)
    assert refusal.where.startswith(f"{folder}/"), f"names no file: {text[:500]}"
    assert "cannot be checked" not in text, f"not foreseen: {text[:500]}"
    assert "allocate" not in text and "MemoryError" not in text, f"memory: {text[:500]}"
    assert text.isprintable(), f"spoils a terminal: {text[:500]!r}"
    assert len(text) <= CHARS_EACH, f"{len(text)} characters: {text[:500]}"
    return False


def _refusal(folder: Path, base: BaseShapes) -> AdapterError | None:
    try:
        check_adapter("stranger", str(folder), base, max_rank=64, target_modules=["all"])
    except AdapterError as error:
        return error
    tensors = read_adapter("stranger", str(folder))
    assert tensors and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    assert served_modules("stranger", str(folder))
    return None


class _Watched:
    """Bounds what a check may take while it runs, and notes what it took."""

    active: _Watched | None = None

    def __init__(self) -> None:
        self.events: list[str] = []
        self.seconds = 0.0

    def __enter__(self) -> _Watched:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self._limits = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + BYTES_EACH
        self._start = time.process_time()
        resource.setrlimit(resource.RLIMIT_AS, (most, self._limits[1]))
        _Watched.active = self
        return self

    def __exit__(self, *error: object) -> None:
        _Watched.active = None
        self.seconds = time.process_time() - self._start
        resource.setrlimit(resource.RLIMIT_AS, self._limits)

    def assert_kept(self) -> None:
        assert self.seconds <= SECONDS_EACH, f"took {self.seconds:.1f} s"
        assert not self.events, f"ran {self.events}"


def _note(event: str, _: tuple[Any, ...]) -> None:
    if _Watched.active is not None and event in _CODE_EVENTS:
        _Watched.active.events.append(event)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("corpus", nargs="?", type=Path, help="where inputs are kept and taken from")
    return parser.parse_args()


def main() -> None:
    """Fuzz for some seconds, or check the one input that was given as a file."""
    args = _parse_args()
    torch.set_num_threads(1)
    sys.addaudithook(_note)
    if args.corpus is not None and args.corpus.is_file():
        print("accepted" if check_one(args.corpus.read_bytes()) else "refused")
        return
    corpus = args.corpus or _SCRATCH / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(content)
    assert check_one(seeds()[0]), "the valid adapter was refused"
    deadline = time.monotonic() + args.seconds

    def target(data: bytes) -> None:
        COUNTS["accepted" if check_one(data) else "refused"] += 1
        if time.monotonic() > deadline:
            _report()
            shutil.rmtree(_SCRATCH, ignore_errors=True)
            os._exit(0)

    options = [f"-seed={args.seed}", "-timeout=20", "-rss_limit_mb=0", "-max_len=4096"]
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={tempfile.gettempdir()}/", str(corpus)], target
    )
    atheris.Fuzz()


def _report() -> None:
    total = sum(COUNTS.values())
    print(
        f"{total} executions: {COUNTS['accepted']} accepted, {COUNTS['refused']} refused",
        flush=True,
    )


_SCRATCH = Path(tempfile.mkdtemp(prefix="adapter-fuzz-"))

if __name__ == "__main__":
    main()
