"""What a browser lets the page of ``/elora/ui`` do."""

from __future__ import annotations

import base64
import hashlib
import re


def content_policy(page: str) -> str:
    """Content-Security-Policy for a page with one script and one style in it: these and no others,
    requests to its own server, in no frame."""

    def own(element: str) -> str:
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
