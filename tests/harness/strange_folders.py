"""Adapter folders as strangers may send them, made out of bytes."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import torch
from safetensors.torch import save

CONFIG, ADDED_TOKENS = "adapter_config.json", "added_tokens.json"
RAW, BOTH_MADE, CONFIG_MADE, WEIGHTS_MADE = range(4)
HIDDEN, _RANK, LAYERS, VOCAB = 8, 2, 2, 16
SIZES = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
_CONFIG_KEYS = [
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "modules_to_save",
    "base_model_name_or_path",
    "init_lora_weights",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "fan_in_fan_out",
    "exclude_modules",
    "lora_dropout",
    "task_type",
    "eva_config",
    "loftq_config",
]
_ATOMS = (
    *("null", "true", "false", "0", "1", "2", "-1", "1.5", "1e308", "-1e308", "NaN", "Infinity"),
    *("-Infinity", "9223372036854775808", "1" + "0" * 400, "9" * 5000, '""', "[]", "{}", "[[]]"),
    *('"LORA"', '"lora"', '"all-linear"', '"pissa"', '"q_proj"', '["q_proj","v_proj"]'),
    *('{"q_proj":4}', '"\\u001b[2J"', '"\\ud800"', '"\\u202e"', '["model.lm_head"]'),
)
_EXPRESSIONS = (
    *("q_proj", "v_proj", ".*", "a", "|", "(", ")", "[", "]", "+", "?", "*", "{9}", "{1000000000}"),
    *("\\d+", "\\.", "^", "$", "(?=", "\\1", "layers", ".", "[[a]", "[a-z]", "\x00", "é", "(?i)"),
    *("\\", "x" * 300, "model.layers.0.self_attn.q_proj"),
)
_TENSOR_NAMES = (
    *("base_model.model.", "model.", "layers.", "0.", "1.", "9.", "self_attn.", "q_proj", "v_proj"),
    *("lm_head", "embed_tokens", ".lora_A", ".lora_B", ".lora_embedding_A", ".weight", ".bias"),
    *(".default", "\x1b[2J", "\n", "\u202e", "\x00", "é", ".experts.", "visual.", "", "\u0967" * 9),
    *("8" * 5000 + ".", "model." * 20_000, "x" * 100_000, "lora_magnitude_vector", "h."),
    *("trainable_tokens", ".base_layer", "unembed_tokens", "language_model."),
)
_DTYPES = (
    *("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I8", "U8"),
    *("I64", "U16", "U32", "U64", "BOOL", "C64", "", "f32", "\x1b", "X" * 9000),
)
_NUMBERS = (0, 1, 2, 3, 4, 8, 16, 64, -1, 255, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30)
_WEIGHT_FILES = (
    *("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt", "other.safetensors"),
    *("a\x1b[2J.safetensors", "other.bin", "a\u202e.pt", "training_args.bin"),
)
_GLOBALS = (
    *("os system", "builtins exec", "posix system", "torch Tensor", "torch.storage UntypedStorage"),
    *("builtins bytearray", "collections Counter", "collections OrderedDict", "torch Size"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_sparse_tensor", "torch device"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_parameter"),
    *("_codecs encode", "torch FloatStorage", "torch.nn.parameter Parameter", "builtins set"),
    *("torch.serialization _get_layout", "torch._utils _rebuild_qtensor", "torch float32"),
    *("torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_wrapper_subclass"),
)


class _Source:
    """Choices made by fuzzed bytes; no bytes left means the first choice, which changes nothing."""

    def __init__(self, data: bytes) -> None:
        self._bytes = atheris.FuzzedDataProvider(data)

    def below(self, end: int) -> int:
        return int(self._bytes.ConsumeIntInRange(0, end - 1))

    def one_of(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def text(self) -> str:
        return str(self._bytes.ConsumeUnicode(self.below(40)))

    def some(self, most: int) -> bytes:
        return bytes(self._bytes.ConsumeBytes(self.below(most)))

    def rest(self) -> bytes:
        return bytes(self._bytes.ConsumeBytes(self._bytes.remaining_bytes()))


def valid_config() -> dict[str, Any]:
    """What PEFT writes into adapter_config.json, in short."""
    return {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    }


def valid_tensors() -> dict[str, torch.Tensor]:
    """Factors of two modules in one layer, by PEFT's names."""
    tensors = {}
    for name in ("q_proj", "v_proj"):
        path = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{path}.lora_A.weight"] = torch.ones(_RANK, HIDDEN)
        tensors[f"{path}.lora_B.weight"] = torch.ones(SIZES[name], _RANK)
    return tensors


def seeds() -> list[bytes]:
    """Inputs to start from: valid adapters in each format, and random choices."""
    config, tensors = json.dumps(valid_config()).encode(), valid_tensors()
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    stored = [save(tensors), save(half)]
    found = []
    for file, contents in ((0, stored), (1, [_saved(tensors), _saved(half)])):
        for weights in contents:
            head = bytes([RAW, file]) + struct.pack("<H", len(config))
            found.append(head + config + weights)
    chosen = random.Random(0)
    for mode in (BOTH_MADE, CONFIG_MADE, WEIGHTS_MADE):
        found.append(bytes([mode]))
        found += [
            bytes([mode | 4 * (size % 2)]) + chosen.randbytes(size) for size in range(4, 400, 6)
        ]
    return found


def build(data: bytes, folder: Path) -> None:
    """Make an adapter's folder out of bytes: files as they stand in them, or valid ones changed.

    The first byte says which of the two; the same bytes always make the same folder.
    """
    mode, body = (data[0] & 3, data[1:]) if data else (RAW, b"")
    if mode == RAW:
        file = _WEIGHT_FILES[(body[:1] or b"\0")[0] % len(_WEIGHT_FILES)]
        end = 3 + struct.unpack("<H", body[1:3])[0] if len(body) > 2 else 0
        config, weights = body[3:end], body[end:]
    else:
        source = _Source(body)
        config = json.dumps(valid_config()).encode()
        if mode in (BOTH_MADE, CONFIG_MADE):
            config = _made_config(source)
        file = "adapter_model.safetensors"
        weights = save(valid_tensors())
        if mode in (BOTH_MADE, WEIGHTS_MADE):
            file = source.one_of(_WEIGHT_FILES)
            made = _made_safetensors if file.endswith(".safetensors") else _made_pickle
            weights = made(source)
        if source.below(16) == 1:
            (folder / ADDED_TOKENS).write_text(_json_object(source), errors="surrogatepass")
    (folder / CONFIG).write_bytes(config)
    (folder / file).write_bytes(weights)


def _json_text(text: str) -> str:
    return json.dumps(text)


def _json_value(source: _Source, depth: int = 0) -> str:
    kind = source.below(10)
    if kind < 4 or depth > 3:
        return str(source.one_of(_ATOMS))
    if kind == 4:
        return _json_text(source.text())
    if kind == 5:
        return "[" + ",".join(_json_value(source, depth + 1) for _ in range(source.below(5))) + "]"
    if kind == 6:
        return _json_object(source, depth + 1)
    if kind == 7:
        return _json_text(source.one_of(_EXPRESSIONS) * source.one_of((1, 2, 2000)))
    size = source.one_of((10, 1000, 30_000))
    if kind == 8:
        return "[" * size + ("]" * size if source.below(2) else "")
    unit = source.one_of((*_ATOMS[:8], '"q_proj"', '"m{}"', "[]"))
    return "[" + ",".join(unit.replace("{}", str(i)) for i in range(size)) + "]"


def _json_object(source: _Source, depth: int = 0) -> str:
    if source.below(8) == 7:
        size = source.one_of((10, 1000, 30_000))
        key = source.one_of(("{}", "q_proj{}", "x{}.*", "(a|b){}", "[{}]"))
        value = source.one_of(("2", "4", "null", "99"))
        return "{" + ",".join(f'"{key}":{value}'.replace("{}", str(i)) for i in range(size)) + "}"
    items = []
    for _ in range(source.below(5)):
        pieces = [source.one_of(_EXPRESSIONS) for _ in range(1 + source.below(4))]
        key = source.text() if source.below(4) == 3 else "".join(pieces)
        items.append(f"{_json_text(key)}:{_json_value(source, depth + 1)}")
    return "{" + ",".join(items) + "}"


def _made_config(source: _Source) -> bytes:
    items = [(key, json.dumps(value)) for key, value in valid_config().items()]
    for _ in range(source.below(5)):
        key = source.one_of(_CONFIG_KEYS)
        if key.endswith("_pattern") and source.below(4):
            value = _json_object(source)
        else:
            value = _json_value(source)
        how = source.below(8)
        if how == 0:
            items.insert(source.below(len(items) + 1), (key, value))
        elif how == 1 and items:
            items.pop(source.below(len(items)))
        else:
            items = [item for item in items if item[0] != key] + [(key, value)]
    text = "{" + ",".join(f"{_json_text(key)}:{value}" for key, value in items) + "}"
    how = source.below(20)
    if how == 17:
        text = source.one_of(("[{}]", "\ufeff{}", "{}x", "null{}")).replace("{}", text)
    elif how == 18:
        text = text[: source.below(len(text))]
    elif how == 19:
        return text.encode("utf-16") + source.some(9)
    return text.encode()


def _made_name(source: _Source, name: str) -> str:
    how = source.below(6)
    if how == 0:
        return name + str(source.one_of(_TENSOR_NAMES))
    if how == 1:
        return str(source.one_of(_TENSOR_NAMES)) + name
    if how == 2:
        return name.replace("model.", source.one_of(_TENSOR_NAMES), source.below(4))
    if how == 3:
        return name.replace(
            "layers.0", "layers." + source.one_of(("1", "2", "7" * 5000, "x", "\u0661"))
        )
    if how == 4:
        return "".join(source.one_of(_TENSOR_NAMES) for _ in range(source.below(8)))
    return source.text()


def _made_safetensors(source: _Source) -> bytes:
    entries: list[tuple[str, dict[str, Any]]] = []
    data = b""
    for name, tensor in valid_tensors().items():
        begin, data = len(data), data + tensor.numpy().tobytes()
        entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
        entries.append((name, entry))
    for _ in range(source.below(5)):
        at = source.below(len(entries)) if entries else 0
        how = source.below(12)
        if how >= 10 or not entries:
            name, (shape, size) = _made_name(source, "model.embed_tokens.weight"), _shape(source)
            dtype = source.one_of(_DTYPES)
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
            entries.append((name, entry))
            data += bytes(size)
            continue
        name, entry = entries[at]
        entry = dict(entry)
        if how in (0, 1):
            name = _made_name(source, name)
        elif how == 2:
            entry["dtype"] = source.one_of((*_DTYPES, None, 5, []))
        elif how == 3:
            entry["shape"] = source.one_of((_shape(source)[0], "88", {"1": 2}, None, [1.0], [[]]))
        elif how == 4:
            end: Any = source.one_of((*_NUMBERS, "4", None, 1.5, [], float("nan"), float("inf")))
            entry["data_offsets"] = [(entry.get("data_offsets") or [0])[0], end][
                : 1 + source.below(3)
            ]
        elif how == 5:
            entry["data_offsets"] = [source.one_of(_NUMBERS), source.one_of(_NUMBERS)]
        elif how == 6:
            entries.append((name, entry))
        elif how == 7 and entry:
            del entry[source.one_of(sorted(entry))]
        elif how == 8:
            number = source.one_of((float("nan"), float("inf"), -1e30, 70_000.0, 1e-40))
            data = struct.pack("<f", number) + data[4:]
        else:
            entry[source.text()] = source.one_of(_NUMBERS)
        entries[at] = (name, entry)
    items = [f"{_json_text(name)}:{json.dumps(entry)}" for name, entry in entries]
    how = source.below(16)
    if how == 14:
        items.append(f'"__metadata__":{_json_value(source)}')
    elif how == 15:
        items.append(f"{_json_text(source.text())}:{_json_value(source)}")
    elif how == 13:
        shown = json.dumps({"dtype": "F32", "shape": [0, 8], "data_offsets": [len(data)] * 2})
        path = source.one_of(("x.{}", "model.layers.0.{}", "{}" + ".model" * 99))
        half = source.one_of((".lora_A.weight", ".weight"))
        items += [f'"{path.replace("{}", str(i))}{half}":{shown}' for i in range(20_000)]
    header = ("{" + ",".join(items) + "}").encode(errors="surrogatepass")
    length = len(header)
    how = source.below(24)
    if how == 22:
        length = source.one_of([n for n in _NUMBERS if 0 <= n < 1 << 64])
    elif how == 23:
        header, data = header[: source.below(len(header))], data + source.some(64)
    return struct.pack("<Q", length) + header + data


def _shape(source: _Source) -> tuple[list[int], int]:
    shape = [source.one_of(_NUMBERS) for _ in range(source.below(4))]
    size = 4
    for number in shape:
        size *= number
    return shape, size if 0 <= size <= 1 << 16 else 4


def _saved(state: object) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def _made_pickle(source: _Source) -> bytes:
    how = source.below(5)
    if how == 0:
        return _saved(_made_state(source))
    if how == 1:
        return source.rest()
    if how == 2:
        return bytes(pickle.dumps(valid_config(), protocol=2)) + source.some(64)
    with zipfile.ZipFile(io.BytesIO(_saved(valid_tensors()))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in files if name.endswith("data.pkl"))
    files[program] = _made_program(source) if how == 3 else _edited(source, files[program])
    stream = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if source.below(16) == 15 else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in files.items():
            if source.below(24) != 23:
                archive.writestr(name, content)
    content = stream.getvalue()
    return _edited(source, content) if source.below(4) == 3 else content


def _edited(source: _Source, content: bytes) -> bytes:
    edited = bytearray(content)
    for _ in range(source.below(6)):
        if edited:
            at = source.below(len(edited))
            edited[at : at + source.below(3)] = source.some(4)
    return bytes(edited)


def _made_program(source: _Source) -> bytes:
    """A pickle that calls some of the known functions with arbitrary numbers."""
    program = b"\x80\x02}"
    for name in ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "b"):
        program += b"X" + struct.pack("<I", len(name)) + name.encode()
        module, _, function = source.one_of(_GLOBALS).partition(" ")
        program += f"c{module}\n{function}\n(".encode()
        for _ in range(source.below(5)):
            how = source.below(5)
            if how == 0:
                number = source.one_of(_NUMBERS)
                program += pickle.dumps(number, protocol=2)[2:-1]
            elif how == 1:
                program += b"X" + struct.pack("<I", 4) + b"true"
            elif how == 2:
                module, _, function = source.one_of(_GLOBALS).partition(" ")
                program += f"c{module}\n{function}\n".encode()
            elif how == 3:
                program += source.one_of((b"N", b"\x88", b")", b"}", b"]"))
            else:
                program += b"(K\x02K\x08t"
        program += b"t" + source.one_of((b"R", b"\x81", b"b", b"Q", b"")) + b"s"
    return program + b"."


def _made_state(source: _Source) -> object:
    state: dict[Any, Any] = dict(valid_tensors())
    changes: list[Callable[[torch.Tensor], Any]] = [
        lambda tensor: torch.zeros(1).expand(tensor.shape),
        lambda tensor: tensor.t().contiguous().t(),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to(torch.float8_e4m3fn),
        lambda tensor: tensor.to(torch.int64),
        lambda tensor: tensor.bool(),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: tensor * float("nan"),
        lambda tensor: tensor[:0],
        lambda tensor: tensor.to_sparse_csr(),
        lambda tensor: {"nested": tensor},
        lambda tensor: tensor.tolist(),
        lambda tensor: torch.tensor(1.0),
        lambda tensor: torch.complex(tensor, tensor).conj().imag,
        lambda tensor: tensor.to(torch.uint16),
    ]
    for _ in range(source.below(4)):
        name = source.one_of(list(state))
        how = source.below(4)
        if how == 0:
            state[_made_name(source, str(name))] = state.pop(name)
        elif how == 1:
            extra = _made_name(source, "model.embed_tokens.weight")
            state[extra] = source.one_of(changes)(torch.ones(VOCAB, HIDDEN))
        elif isinstance(state[name], torch.Tensor) and state[name].layout == torch.strided:
            if state[name].dtype == torch.float32 and state[name].device.type == "cpu":
                state[name] = source.one_of(changes[: -1 if state[name].dim() != 2 else None])(
                    state[name] if state[name].dim() == 2 else torch.ones(_RANK, HIDDEN)
                )
        else:
            state[source.one_of((1, None, b"b", "\x1b"))] = source.text()
    return state
