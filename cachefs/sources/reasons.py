"""Why a request did not come to an answer, in words: which endpoint, and what happened there. Rule: it describes
and never decides; whose failure something is, is for `glance` and `endpoints`.

The libraries wrap what happened several times and print all of it: keystoneauth around requests around urllib3
around the system's error. What an operator needs is the innermost reason, and where.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from urllib3 import exceptions as u3

DEPTH_MAX = 12
_URL = re.compile(r"https?://[^\s'\"<>,;)]+")


def in_words(error: BaseException) -> str:
    """One line: `http://controller:9292: connection refused`. What is not known here stays as it was said."""
    causes = list(_causes(error))
    what = next(filter(None, map(_reason, reversed(causes))), None)
    if what is None:
        return " ".join(str(error).split()) or type(error).__name__
    where = next(filter(None, map(_endpoint, causes)), None)
    return f"{where}: {what}" if where else what


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it wraps, the innermost last. Libraries wrap by cause, by context, and by argument."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and len(seen) < DEPTH_MAX:
        seen.add(id(error))
        yield error
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((part for part in error.args if isinstance(part, BaseException)), None)
        error = inner or error.__cause__ or error.__context__


def _endpoint(error: BaseException) -> str | None:
    request = getattr(error, "request", None)
    url = getattr(request, "url", None)
    if not isinstance(url, str):
        found = _URL.search(str(error)) if not isinstance(error, OSError) else None
        url = found[0] if found else None
    if url is None:
        return None
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2].rstrip(':')}"


def _reason(error: BaseException) -> str | None:
    """In a few words, where that is a kind that is known."""
    match error:
        case socket.gaierror():
            return f"its name cannot be resolved ({error.strerror})"
        case ssl.SSLCertVerificationError():
            return f"its certificate is not accepted: {error.verify_message}"
        case ssl.SSLError():
            return f"no TLS: {error.reason or error.strerror or error}"
        case u3.ConnectTimeoutError():
            return "no connection in time"
        case u3.ReadTimeoutError() | TimeoutError():
            return "no answer in time"
        case u3.ProxyError():
            return "the proxy cannot be reached"
        case ConnectionRefusedError():
            return "connection refused"
        case http.client.RemoteDisconnected():
            return "the connection was closed without an answer"
        case http.client.BadStatusLine() | http.client.LineTooLong():
            return "what answers there speaks no HTTP"
        case u3.IncompleteRead():
            return "the body was cut short"
        case OSError(errno=int(), strerror=str()):
            return str(error.strerror).lower()
    return None
