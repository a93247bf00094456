"""The Content-Security-Policy of the page at ``/elora/ui``."""

from __future__ import annotations

import base64
import hashlib
import re


def content_policy(page: str) -> str:
    """A Content-Security-Policy that allows only the page's one inline script and style, and
    requests to its own server, and forbids framing."""

    def own(element: str) -> str:
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
