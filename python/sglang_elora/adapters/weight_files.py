"""An adapter's weight files: which they are, their headers and their tensors."""

from __future__ import annotations

import importlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_elora.adapters.bounded_files import MAX_HEADER_BYTES, check_zip, open_regular
from sglang_elora.adapters.errors import AdapterFolder, Problem

CONFIG_FILE = "adapter_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
WEIGHT_STEM = "adapter_model"
WEIGHT_FILE = f"{WEIGHT_STEM}.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
"""File formats in SGLang's order of preference: only the first one present is read."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_COPY_AGAIN = "Copy or download the adapter again"
# safetensors name -> (name in torch, bytes per element) of the floating-point types.
_FLOATS = {
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
}
_SIZES = dict(_FLOATS.values())
_CHANGED = (ValueError, LookupError, TypeError, struct.error)  # of a header that was checked before
_SERIAL_ELEMENTS = 1 << 14
_MAX_TENSORS = 1 << 17
"""Factor pairs of each linear layer of a 405B model are 1764 tensors; those of each expert of
Qwen3-235B-A22B 72,192, and of DeepSeek-V3 89,088."""
_MAX_COMMAS, _MAX_BRACKETS = 8 * _MAX_TENSORS, 4 * _MAX_TENSORS  # in a header; a tensor has 5 and 3
_MAX_NAME_CHARS = 256

MAX_WEIGHT = 65_504
"""Largest accepted weight: float16's maximum, far beyond trained weights. A larger one is finite
in the file and may become infinite in the serving dtype."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor without its data. ``dtype`` is torch's name if it is floating-point."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype in _SIZES

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.num_elements * _SIZES[self.dtype]


def weight_names(names: Iterable[str]) -> list[str]:
    """Names of the files with the adapter's weights: PEFT's ``adapter_model.*`` alone if present (a
    trainer may save a value head or the model in the same folder), otherwise all of one format."""
    found = {name for name in names if name not in _NOT_WEIGHTS}
    for suffix in WEIGHT_SUFFIXES:
        if WEIGHT_STEM + suffix in found:
            return [WEIGHT_STEM + suffix]
    for suffix in WEIGHT_SUFFIXES:
        if of_format := sorted(name for name in found if name.endswith(suffix)):
            return of_format
    return []


def find_weight_files(folder: AdapterFolder) -> list[Path]:
    """Paths of the folder's ``weight_names``.

    Raises:
        AdapterError: The folder has none.
    """
    names = weight_names(path.name for path in folder.path.iterdir())
    if names:
        return [folder.path / name for name in names]
    raise folder.error(
        WEIGHT_FILE,
        "the weights file is missing, and the folder has no other *.safetensors, *.bin or *.pt",
        "Point to the folder that PEFT's save_pretrained wrote",
    )


def read_tensors(folder: AdapterFolder, files: Sequence[Path]) -> list[TensorInfo]:
    """Tensors in the headers of all files.

    Raises:
        AdapterError: A file is broken, or a tensor is stored twice.
    """
    tensors = [info for file in files for info in _read_file(folder, file)]
    if len(tensors) > _MAX_TENSORS:
        text = f"the adapter has {len(tensors)} tensors, of at most {_MAX_TENSORS}"
        raise folder.error(files[0].name, text, _COPY_AGAIN)
    folder.raise_if_any(
        [
            Problem(
                info.file, f"tensor {info.name[:40]!r} has a name of {len(info.name)} characters"
            )
            for info in tensors
            if len(info.name) > _MAX_NAME_CHARS or not info.name.isprintable()
        ],
        f"Names have at most {_MAX_NAME_CHARS} characters, all printable. {_COPY_AGAIN}",
    )
    seen: dict[str, TensorInfo] = {}
    twice = []
    for info in tensors:
        if info.name in seen:
            other = seen[info.name].file
            twice.append(Problem(info.file, f"tensor {info.name!r} is also in {other}"))
        seen[info.name] = info
    folder.raise_if_any(twice, "Leave one weights file in the folder")
    if not tensors:
        raise folder.error(files[0].name, "it holds no tensors", _COPY_AGAIN)
    return tensors


def load_tensors(folder: AdapterFolder, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The wanted tensors of the adapter as torch tensors by name; raises as ``read_tensors``."""
    files = find_weight_files(folder)
    read_tensors(folder, files)  # raises errors that name file and remedy
    return {name: tensor for file in files for name, tensor in _data(folder, file, wanted)}


def unusable_tensors(folder: AdapterFolder, files: Sequence[Path]) -> list[Problem]:
    """``unusable`` for files. Reads all data: about 0.2 s for 84 MB from the page cache."""
    return [p for file in files for p in unusable(file.name, _data(folder, file))]


def unusable(file: str, tensors: Iterable[tuple[str, Any]]) -> list[Problem]:
    """One problem per (name, torch tensor) pair that has NaN or values beyond ``MAX_WEIGHT``."""
    torch: Any = importlib.import_module("torch")
    ordered = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    problems = []
    for name, tensor in tensors:
        flat = tensor.flatten() if tensor.dtype in ordered else tensor.flatten().float()
        # Blocks below torch's grain size stay on this thread: waking a thread pool that shares
        # its cores with a running server took 50 times as long as the work itself.
        ends = [end for block in flat.split(_SERIAL_ELEMENTS) for end in torch.aminmax(block)]
        largest = float(torch.stack(ends).abs().amax()) if len(flat) else 0.0  # NaN if one is
        if not math.isfinite(largest):
            problems.append(Problem(file, f"{name!r} has values that are NaN or infinite"))
        elif largest > MAX_WEIGHT:
            text = f"{name!r} has values of up to {largest:.3g}, of at most {MAX_WEIGHT:,}"
            problems.append(Problem(file, text))
    return problems


def _read_file(folder: AdapterFolder, file: Path) -> list[TensorInfo]:
    try:
        with open_regular(file) as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            head = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise folder.error(file.name, f"cannot read it: {error}", _COPY_AGAIN) from error
    if size_bytes == 0:
        raise folder.error(file.name, "the file is empty (0 bytes)", _COPY_AGAIN)
    if head == _LFS_POINTER:
        raise folder.error(
            file.name,
            f"this is a Git LFS pointer of {size_bytes} bytes, not the weights",
            "Run 'git lfs install' and 'git lfs pull' in the adapter's repository",
        )
    if file.suffix == ".safetensors":
        return _read_safetensors(folder, file, size_bytes)
    return [
        TensorInfo(file.name, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in _load_pickle(folder, file).items()
    ]


def _read_safetensors(folder: AdapterFolder, file: Path, size_bytes: int) -> list[TensorInfo]:
    """Tensors in a safetensors header: 8 bytes of length, then JSON (dtype, shape, offsets)."""
    with open_regular(file) as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size_bytes
        if header_bytes > size_bytes - 8:
            raise folder.error(
                file.name,
                f"not a safetensors file, or cut off inside its header: it has {size_bytes} "
                f"bytes, the header alone would need {header_bytes + 8}",
                _COPY_AGAIN,
            )
        if header_bytes > MAX_HEADER_BYTES:
            raise folder.error(
                file.name,
                f"its safetensors header has {header_bytes} bytes, of at most {MAX_HEADER_BYTES}",
                _COPY_AGAIN,
            )
        text = stream.read(header_bytes)
    try:
        header = _parse_header(text)
        data_bytes = max(
            (_number(entry["data_offsets"][1]) for entry in header.values()), default=0
        )
        infos = [
            TensorInfo(file.name, name, _dtype(entry["dtype"]), tuple(map(_number, entry["shape"])))
            for name, entry in header.items()
        ]
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise folder.error(
            file.name, f"its safetensors header does not parse: {error}", _COPY_AGAIN
        ) from error
    stored_bytes = size_bytes - 8 - header_bytes
    if stored_bytes != data_bytes:
        what = "truncated" if stored_bytes < data_bytes else "corrupt"
        raise folder.error(
            file.name,
            f"{what}: its header announces {data_bytes} bytes of weights, "
            f"the file holds {stored_bytes}",
            _COPY_AGAIN,
        )
    _open_as_loader_does(folder, file)
    return infos


def _parse_header(text: bytes) -> dict[str, Any]:
    """The header's entries by name; no other JSON is parsed that would take much more memory."""
    if text.count(b",") > _MAX_COMMAS or text.count(b"[") + text.count(b"{") > _MAX_BRACKETS:
        raise ValueError(f"it has more than {_MAX_TENSORS} entries")
    header: dict[str, Any] = json.loads(text)
    header.pop("__metadata__", None)
    return header


def _open_as_loader_does(folder: AdapterFolder, file: Path) -> None:
    """Refuse a file whose header the loading library rejects, although our own check passed."""
    safetensors: Any = importlib.import_module("safetensors")
    try:
        with safetensors.safe_open(str(file), framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise folder.error(
            file.name, f"safetensors rejects the file: {error}", _COPY_AGAIN
        ) from error


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{str(value)[:40]!r} is not a size")
    return value


def _dtype(code: str) -> str:
    return _FLOATS[code][0] if code in _FLOATS else code


def _load_pickle(folder: AdapterFolder, file: Path) -> dict[str, Any]:
    """Tensors of a .bin or .pt file, loaded on the CPU with ``weights_only`` (runs no code)."""
    torch: Any = importlib.import_module("torch")
    load: Callable[..., Any] = torch.load
    try:
        check_zip(file)
        state = load(str(file), map_location="cpu", weights_only=True)
    except Exception as error:  # the pickle calls functions with arbitrary arguments
        first_line = (str(error).splitlines() or [""])[0]
        raise folder.error(
            file.name,
            f"torch cannot load it as plain tensors: {type(error).__name__}: {first_line}",
            "Re-save it as safetensors (peft: save_pretrained), or copy it again if it is cut off",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise folder.error(
            file.name,
            "it is not a flat dictionary of tensors",
            "Re-save the adapter with PEFT's save_pretrained",
        )
    if any(
        tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized
        for tensor in state.values()
    ):
        raise folder.error(
            file.name,
            "it has tensors that are sparse, quantized or without data",
            "Re-save the adapter with PEFT's save_pretrained",
        )
    announced, held = sum(tensor.nbytes for tensor in state.values()), file.stat().st_size
    if announced > held:
        raise folder.error(
            file.name,
            f"its tensors have {announced} bytes, the file holds {held}",
            "Save contiguous tensors, each with its own data",
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def _data(
    folder: AdapterFolder, file: Path, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Any]]:
    if file.suffix != ".safetensors":
        loaded = _load_pickle(folder, file).items()
        yield from ((name, tensor) for name, tensor in loaded if wanted(name))
        return
    safetensors: Any = importlib.import_module("safetensors")
    load: Any = importlib.import_module("safetensors.torch").load
    try:
        # Read, not mapped: truncating a mapped file would kill this process with SIGBUS.
        yield from load(_part(file, wanted)).items()
    except (safetensors.SafetensorError, OSError, *_CHANGED) as error:
        raise folder.error(file.name, f"cannot read it: {error}", _COPY_AGAIN) from error


def _part(file: Path, wanted: Callable[[str], bool]) -> bytes:
    """The content of a safetensors file with the wanted tensors only; no others are read."""
    with open_regular(file) as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = _parse_header(stream.read(min(header_bytes, MAX_HEADER_BYTES)))
        names = [name for name in header if wanted(name)]
        if len(names) == len(header):
            stream.seek(0)
            return stream.read()
        entries, parts, end_made = {}, list[bytes](), 0
        for name in names:
            begin, end = header[name]["data_offsets"]
            stream.seek(8 + header_bytes + begin)
            parts.append(stream.read(end - begin))
            begin_made, end_made = end_made, end_made + len(parts[-1])
            entries[name] = {**header[name], "data_offsets": [begin_made, end_made]}
    text = json.dumps(entries).encode()
    return b"".join([struct.pack("<Q", len(text)), text, *parts])
