"""Bounded reading of untrusted files: no more bytes or memory than a sane adapter needs."""

from __future__ import annotations

import functools
import os
import pickletools
import stat
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from sglang_elora.adapters.errors import AdapterError

MAX_JSON_BYTES = 4 << 20
"""Size limit of adapter_config.json. PEFT's have a few KiB; raising it lets a larger file be
parsed."""

MAX_TOKENS_BYTES = 8 << 20
"""Size limit of added_tokens.json, which may list a whole vocabulary."""

MAX_HEADER_BYTES = 24 << 20
"""Size limit of a safetensors file's header, which takes about 170 bytes per tensor."""

MAX_PROGRAM_BYTES = 4 << 20
"""Size limit of the pickle in a torch.save file, which takes about 250 bytes per tensor."""

# The calls that a pickled dictionary of tensors needs. Other calls that torch considers safe can
# allocate any amount of memory, such as torch.storage.UntypedStorage(1 << 40).
_CALLS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        *(
            f"torch {kind}Storage"
            for kind in ["BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half"]
        ),
        *(f"torch {kind}Storage" for kind in ["Int", "Long", "Short"]),
    }
)
_SOURCE = "Get it from a source that you trust, and as PEFT's save_pretrained wrote it"
_P = ParamSpec("_P")
_T = TypeVar("_T")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never blocks, as opening a pipe without a writer would.

    Raises:
        OSError: It cannot be opened, or is a pipe, a device, a socket or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The content of a file of at most ``most_bytes``.

    Raises:
        OSError: As ``open_regular``, or it has more than ``most_bytes``.
    """
    with open_regular(path) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(f"it has more than {most_bytes} bytes, where a few thousand are usual")
    return content


def check_zip(path: Path) -> None:
    """Check that loading a torch.save file takes no more memory than the file has bytes.

    torch.save writes an uncompressed zip archive; a pickle in it says how to build the tensors.

    Raises:
        OSError: It cannot be read, is no such archive, is compressed, or its pickle calls a
            function that a dictionary of tensors does not need.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            with zipfile.ZipFile(stream) as archive:
                entries = archive.infolist()
                _check_entries(entries, size)
                programs = [entry for entry in entries if entry.filename.endswith("data.pkl")]
                for entry in programs:
                    _check_program(archive.read(entry))
        except (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError) as error:
            raise OSError(f"not a file of torch.save since 1.6: {error}") from error


def _check_entries(entries: Sequence[zipfile.ZipInfo], archive_bytes: int) -> None:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise OSError("its content is compressed, which torch does not do")
    if sum(entry.file_size for entry in entries) > archive_bytes:
        raise OSError("its directory names more bytes than it has")
    if len({entry.filename for entry in entries}) < len(entries):
        raise OSError("its directory has a name twice")
    for entry in entries:
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PROGRAM_BYTES:
            text = f"its pickle has {entry.file_size} bytes, of at most {MAX_PROGRAM_BYTES}"
            raise OSError(text)


def _check_program(program: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL" and argument not in _CALLS:
            raise OSError(f"its pickle names {argument}, which tensors do not need")


def refused_not_raised(check: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator of a check ``(name, path or content, ...)`` that turns every error into a refusal.

    Raises:
        AdapterError: In place of any other error.
    """

    @functools.wraps(check)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return check(*args, **kwargs)
        except AdapterError:
            raise
        except (Exception, MemoryError) as error:
            name, where = str(args[0]), args[1] if isinstance(args[1], str) else "request"
            reason = f"it cannot be checked: {type(error).__name__}: {str(error)[:200]}"
            raise AdapterError(name, where, reason, _SOURCE) from error

    return checked
