"""Adapters at a URL: ``s3://``, ``gs://``, ``hf://``, ``https://`` with a listing, and the others
of ``PROTOCOLS``, through fsspec's file systems. Each version is downloaded once, to a local folder.
The size of one adapter and the size of the whole cache are bounded.

The file system reads credentials and endpoints from its environment (``AWS_*``,
``FSSPEC_S3_ENDPOINT_URL``, ...).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_elora.adapters.errors import AdapterError
from sglang_elora.adapters.weight_files import ADDED_TOKENS_FILE, CONFIG_FILE, weight_names

PROTOCOLS = frozenset(
    {"s3", "s3a", "gs", "gcs", "hf", "http", "https", "az", "abfs", "abfss", "adl", "oss", "obs"}
)
"""Accepted URL schemes. fsspec's others (local files, archives, chained file systems) are not."""

MAX_ADAPTER_BYTES = 8 * 2**30
"""Size limit of one adapter's files; rank 64 on all modules of a 70B model has 1.7 GB in
bfloat16."""

MAX_CACHE_BYTES = 64 * 2**30
"""Size of all folders in the cache above which the least recently used ones are removed, except
those in use by a running server."""

_CHUNK_BYTES = 4 * 2**20
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s:]\S*", re.IGNORECASE)
_REMEDY = f"Give the URL of a folder that holds {CONFIG_FILE} and its weights"
_Info = Mapping[str, Any]


def is_url(path: str) -> bool:
    return _URL.fullmatch(path) is not None and "::" not in path


def has_adapter(url: str) -> bool:
    """Whether there is an adapter config at the URL. Asks the server each time (network, blocking).

    Raises:
        Exception: The file system's own errors, if it cannot be reached.
    """
    fs, root = _open(url)
    return bool(fs.exists(f"{root}/{CONFIG_FILE}"))


def download(name: str, url: str) -> Path:
    """Download the adapter's current version and return its local folder (network, blocking).

    A version in the cache is not fetched again: the folder's name is a digest of the URL and of
    the files' metadata (size, etag, time). The folder appears complete or not at all, also when
    several processes fetch it. It is kept until ``keep_only`` omits it or this process ends.

    Raises:
        AdapterError: It cannot be reached, it is too large, or there is no adapter.
    """
    try:
        fs, root = _open(url)
        wanted = _wanted(fs.ls(root, detail=True))
        if CONFIG_FILE in wanted:
            return _fetch(fs, url, {file: fs.info(path) for file, path in wanted.items()})
    except _TooLarge as error:
        raise AdapterError(name, url, str(error), "Serve a smaller one") from None
    except Exception as error:  # each file system has its own error types
        raise AdapterError(name, url, f"fetching it failed: {_short(error)}", _REMEDY) from error
    raise AdapterError(name, url, f"there is no {CONFIG_FILE}", _REMEDY)


def keep_only(paths: Iterable[str]) -> None:
    """Keep these folders of ``download`` in the cache, and allow removing this process's others.

    Args:
        paths: All folders this process serves adapters from; those outside the cache are ignored.
    """
    cache = str(cache_folder())
    used = {Path(path) for path in paths if os.path.dirname(path) == cache}
    for folder in list(_held):
        if folder not in used:
            os.close(_held.pop(folder))
    for folder in used - set(_held):  # a concurrent call without this folder released it
        _hold(folder)


class _TooLarge(Exception):
    pass


def _open(url: str) -> tuple[Any, str]:
    fsspec: Any = importlib.import_module("fsspec.core")
    protocol = url.partition("://")[0].lower()
    if protocol not in PROTOCOLS:
        raise ValueError(f"{protocol}:// is none of {', '.join(sorted(PROTOCOLS))}")
    options = {"get_client": _client_on_one_host} if protocol in ("http", "https") else {}
    fs, root = fsspec.url_to_fs(url, **options)
    fs.invalidate_cache()  # cached listings would hide new versions
    return fs, root.rstrip("/")


async def _client_on_one_host(**options: Any) -> Any:
    """An aiohttp client that refuses redirects to another host."""
    aiohttp: Any = importlib.import_module("aiohttp")

    async def refuse(session: Any, context: Any, request: Any) -> None:
        target = request.url.join(type(request.url)(request.response.headers["Location"]))
        if target.origin() != request.url.origin():
            raise OSError(f"{request.url.origin()} leads to another host, {target.origin()}")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    return aiohttp.ClientSession(trace_configs=[trace], **options)


def _wanted(listed: Sequence[_Info]) -> dict[str, str]:
    """Name -> path of the files to fetch: configuration, and weights in the one format read."""
    files = {posixpath.basename(info["name"]): info["name"] for info in listed}
    keep = {CONFIG_FILE, ADDED_TOKENS_FILE, *weight_names(files)}
    return {file: path for file, path in files.items() if file in keep}


def _fetch(fs: Any, url: str, infos: Mapping[str, _Info]) -> Path:
    known = sum(info.get("size") or 0 for info in infos.values())
    if known > MAX_ADAPTER_BYTES:
        raise _TooLarge(f"its files have {known} bytes, of at most {MAX_ADAPTER_BYTES}")
    version = json.dumps([url, infos], sort_keys=True, default=str)
    cache = cache_folder()
    folder = cache / hashlib.sha256(version.encode()).hexdigest()[:32]
    if _hold(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".", dir=cache))
    try:
        _copy(fs, infos, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has completed the same folder
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not _hold(folder):
        raise OSError(f"{folder} was removed while it was fetched")
    _make_room(cache)
    return folder


def _copy(fs: Any, infos: Mapping[str, _Info], target: Path) -> None:
    """Copy the files to ``target``. Counts the received bytes, as announced sizes may be wrong."""
    left = MAX_ADAPTER_BYTES
    for file, info in infos.items():
        with fs.open(info["name"], "rb") as source, (target / file).open("wb") as copy:
            while chunk := source.read(_CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    raise _TooLarge(f"its files have more than {MAX_ADAPTER_BYTES} bytes")
                copy.write(chunk)


_held: dict[Path, int] = {}
"""Folders that this process uses, each with the descriptor that holds its lock."""


def _hold(folder: Path) -> bool:
    """Lock a folder against removal and update its time of use; False if it does not exist."""
    if folder not in _held:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if folder in _held or not folder.exists():  # by another thread; removed before the lock
            os.close(descriptor)
            return folder in _held
        _held[folder] = descriptor
    os.utime(folder)
    return True


def _make_room(cache: Path) -> None:
    """Remove folders that no process holds, least recently used first, until the rest fit in
    ``MAX_CACHE_BYTES``."""
    folders = [entry for entry in cache.iterdir() if entry.is_dir() and entry.name[0] != "."]
    sizes = {folder: sum(f.stat().st_size for f in folder.iterdir()) for folder in folders}
    excess = sum(sizes.values()) - MAX_CACHE_BYTES
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
        if excess <= 0:
            break
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            excess -= sizes[folder]
        os.close(descriptor)


def cache_folder() -> Path:
    """The parent of all folders of ``download``, which are named by version."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sglang_elora" / "adapters"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")
