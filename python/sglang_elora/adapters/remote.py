"""Adapters behind a URL: whatever fsspec has a file system for (``s3://``, ``gs://``, ``hf://``,
``https://`` with a listing, ...). Their files come to a local folder, once for each version.

Credentials and endpoints are what the file system takes from its environment (``AWS_*``,
``FSSPEC_S3_ENDPOINT_URL``, ...).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_elora.adapters.errors import AdapterError
from sglang_elora.adapters.weight_files import ADDED_TOKENS_FILE, CONFIG_FILE, weight_names

_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s:]\S*", re.IGNORECASE)
_REMEDY = f"Give the URL of a folder that holds {CONFIG_FILE} and its weights"
_Info = Mapping[str, Any]


def is_url(path: str) -> bool:
    return _URL.fullmatch(path) is not None and "::" not in path


def has_adapter(url: str) -> bool:
    """Whether a config lies there. Asks the remote side each time (network, blocking).

    Raises:
        Exception: Of the file system's own kinds, if it cannot be asked.
    """
    fs, root = _open(url)
    return bool(fs.exists(f"{root}/{CONFIG_FILE}"))


def download(name: str, url: str) -> Path:
    """The local folder of the adapter as it is now behind the URL (network, blocking).

    A version that is there is not fetched again: the folder's name is a digest of what the file
    system tells of the files (size, etag, time). It appears whole or not at all, also when several
    processes fetch it, and nothing removes it.

    Raises:
        AdapterError: It cannot be reached, or there is no adapter.
    """
    try:
        fs, root = _open(url)
        wanted = _wanted(fs.ls(root, detail=True))
        if CONFIG_FILE in wanted:
            return _fetch(fs, url, {file: fs.info(path) for file, path in wanted.items()})
    except Exception as error:  # each file system has errors of its own
        raise AdapterError(name, url, f"fetching it failed: {_short(error)}", _REMEDY) from error
    raise AdapterError(name, url, f"there is no {CONFIG_FILE}", _REMEDY)


def _open(url: str) -> tuple[Any, str]:
    fsspec: Any = importlib.import_module("fsspec.core")
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()  # of listings: what is new there counts
    return fs, root.rstrip("/")


def _wanted(listed: Sequence[_Info]) -> dict[str, str]:
    """Path of each file to fetch, by its name: the weights in one format only, as they are read."""
    files = {posixpath.basename(info["name"]): info["name"] for info in listed}
    keep = {CONFIG_FILE, ADDED_TOKENS_FILE, *weight_names(files)}
    return {file: path for file, path in files.items() if file in keep}


def _fetch(fs: Any, url: str, infos: Mapping[str, _Info]) -> Path:
    version = json.dumps([url, infos], sort_keys=True, default=str)
    cache = _cache_folder()
    folder = cache / hashlib.sha256(version.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".", dir=cache))
    try:
        for file, info in infos.items():
            fs.get_file(info["name"], str(partial / file))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # nobody else was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sglang_elora" / "adapters"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")
