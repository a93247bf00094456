"""Where adapters may come from (``--elora-adapter-sources``), and which of them has a name."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

from sglang_elora.adapters.folder_scan import leads_out
from sglang_elora.adapters.remote import is_url
from sglang_elora.adapters.weight_files import CONFIG_FILE

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")  # no part begins with a dot: neither . nor ..
_MISSING_S = 5.0
_MISSING_MOST = 4096


class AllowedSources:
    """Folders and URLs under which each adapter is a folder by its name.

    Args:
        places: Local folders and URLs: first the folders are asked, then the URLs, each in this
            order.

    Raises:
        ValueError: A place is neither an absolute folder nor a URL.
    """

    def __init__(self, places: Iterable[str]) -> None:
        self._places = [place.rstrip("/") for place in places]
        self._missing: dict[str, float] = {}  # oldest first; until when it is not asked for again
        for place in self._places:
            if not is_url(place) and not Path(place).is_absolute():
                raise ValueError(f"a source must be an absolute folder or a URL, got {place!r}")

    def __bool__(self) -> bool:
        return bool(self._places)

    def look(self, name: str) -> tuple[str | None, list[str]]:
        """The adapter's path in a local place, and if it is in none, its URL in each other place,
        for the caller to ask there and to say if it was ``missed``.

        A name is one or more parts of letters, digits, ``_``, ``-`` and ``.``, joined by ``/``, so
        it leads to nothing outside of the places; nor do links there. What is in no place is not
        looked for again for 5 s, so that nobody can make a server ask without end.
        """
        now_s = time.monotonic()
        if not _NAME.fullmatch(name) or self._missing.get(name, 0.0) > now_s:
            return None, []
        paths = [f"{place}/{name}" for place in self._places]
        for place, path in zip(self._places, paths, strict=True):
            if not is_url(place) and _is_inside(place, Path(path)):
                return path, []
        urls = [path for path in paths if is_url(path)]
        if not urls:
            self.missed(name)
        return None, urls

    def missed(self, name: str) -> None:
        """No place has an adapter of this name, as was found just now."""
        self._missing.pop(name, None)
        self._missing[name] = time.monotonic() + _MISSING_S
        if len(self._missing) > _MISSING_MOST:
            self._missing.pop(next(iter(self._missing)), None)  # another thread may be faster

    def allows(self, path: str) -> bool:
        """Whether the adapter at this path (folder, URL or Hugging Face id) lies in one of them."""
        if not is_url(path) and not Path(path).exists():
            path = f"hf://{path}"  # SGLang takes what is no folder for an id
        for place in self._places:
            inside = path.removeprefix(f"{place}/")
            if is_url(place) and inside != path and _NAME.fullmatch(inside.rstrip("/")):
                return True
            if not is_url(place) and not is_url(path) and not leads_out(Path(place), Path(path)):
                return True
        return False

    def __str__(self) -> str:
        return ", ".join(self._places)


def _is_inside(place: str, path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and not leads_out(Path(place), path)
