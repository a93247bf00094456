"""Local folder of an adapter that the user names by folder, URL or Hugging Face id."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from sglang_elora.adapters.errors import AdapterError, AdapterFolder
from sglang_elora.adapters.remote import download, is_url
from sglang_elora.adapters.weight_files import CONFIG_FILE, WEIGHT_SUFFIXES

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_GIVE_A_FOLDER = (
    f"Give the folder that holds {CONFIG_FILE}, its URL, or the id of a Hugging Face repository"
)


def find_folder(name: str, path: str) -> AdapterFolder:
    """Return the local folder of an adapter, downloading it if ``path`` is a URL or a Hub id.

    As in SGLang, anything that is not a local folder and can be a Hub id is requested from the Hub
    (network, blocking; a snapshot already in the cache is used offline).
    """
    if is_url(path):
        return AdapterFolder(name, download(name, path))
    local = Path(path)
    try:
        is_folder, exists = local.is_dir(), local.exists()
    except OSError as error:
        text = f"the path cannot be read: {error.strerror}"
        raise AdapterError(name, path, text, _GIVE_A_FOLDER) from error
    if is_folder:
        return AdapterFolder(name, local)
    if exists:
        raise AdapterError(name, path, "the path is a file, not a folder", _GIVE_A_FOLDER)
    if not _HUB_ID.fullmatch(path):
        raise AdapterError(name, path, "the path does not exist", _GIVE_A_FOLDER)
    return AdapterFolder(name, _download(name, path))


def _download(name: str, path: str) -> Path:
    hub: Any = importlib.import_module("huggingface_hub")
    fetched = None
    try:
        for suffix in WEIGHT_SUFFIXES:  # formats that would not be read are not downloaded
            pattern = f"*{suffix}"
            wanted = ["*.json", pattern]
            fetched = Path(
                hub.snapshot_download(path, allow_patterns=wanted, ignore_patterns="*/*")
            )
            if any(fetched.glob(pattern)):
                break
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of these
        text = " ".join(str(error).split())
        raise AdapterError(
            name,
            path,
            "there is no such folder, and getting it from the Hugging Face Hub failed: "
            f"{type(error).__name__}: {text[:300]}",
            f"{_GIVE_A_FOLDER} that this machine can reach",
        ) from error
    assert fetched is not None
    return fetched
