"""Repeated tries to read what a network does not give."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
WAITS = (1.0, 4.0, 16.0, 64.0)
"""Seconds to wait before the next try, as long as none brings a byte or a sample."""
LONGEST = 300.0
"""Seconds that a server's Retry-After is heeded, at most."""
_PASSING = {408, 409, 425, 429}
"""HTTP codes below 500 that another try may not meet again."""


class Unreachable(ConnectionError):
    """A shard that cannot be read over the network, although it was there; later it may be."""

    exit_code = 75


def retrying(url: str, act: Callable[[], T], waits: Sequence[float]) -> T:
    """Do something until it succeeds or the waits are over."""
    patience = Patience(url, waits)
    while True:
        try:
            return act()
        except Exception as error:  # stores and servers raise anything
            patience.after(error)


class Patience:
    """Waits between the tries to read a file.

    Args:
        url: The file, for messages.
        waits: Seconds before each further try.
    """

    def __init__(self, url: str, waits: Sequence[float]) -> None:
        self.url, self.waits = url, tuple(waits)
        self._left = list(waits)

    def renew(self) -> None:
        """Begin anew, since something came."""
        self._left = list(self.waits)

    def after(self, error: Exception) -> None:
        """Wait for the next try.

        Raises:
            OSError: If another try would meet the same error, or none is left.
            ValueError: If a package cannot read the URL.
        """
        code, reason = _code(error), " ".join(str(error).split()) or type(error).__name__
        is_missing = isinstance(error, FileNotFoundError) and error.__cause__ is None
        if code in (404, 410) or (code is None and is_missing):
            raise FileNotFoundError(f"{self.url}: no such file in the store") from error
        if code in (401, 403) or (
            isinstance(error, PermissionError) or "Credentials" in type(error).__name__
        ):
            raise PermissionError(f"{self.url}: the store denies access ({reason:.120})") from error
        is_final = isinstance(error, ImportError | ValueError | TypeError | NotImplementedError)
        if (code is None and is_final) or (code is not None and code < 500 and code not in _PASSING):
            raise ValueError(f"{self.url}: cannot be read ({reason:.120})") from error
        if not self._left:
            tries = len(self.waits) + 1
            raise Unreachable(f"{self.url}: {tries} tries failed ({reason:.120}): try again later") from error
        time.sleep(max(self._left.pop(0), min(_retry_after(error), LONGEST)))


def _code(error: BaseException | None) -> int | None:
    """Return the HTTP code that an error is about; fsspec's own may hide it in their cause."""
    from aiohttp import ClientPayloadError

    if str(error).startswith("Forbidden: "):  # of gcsfs, an OSError without a code
        return 403
    while error is not None and not isinstance(error, ClientPayloadError):  # has a code that nobody sent
        response = getattr(error, "response", None)
        in_response = getattr(response, "status_code", None)
        if isinstance(response, dict):  # of botocore
            in_response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        status = getattr(error, "status", None)
        for code in (getattr(error, "code", None) if status is None else status, in_response):
            if str(code).isdigit() and int(str(code)) >= 400:
                return int(str(code))
        error = error.__cause__
    return None


def _retry_after(error: BaseException | None) -> float:
    """Return the seconds that a server asked to wait; 0 if it did not, or gave a date."""
    while error is not None:
        headers = getattr(error, "headers", None) or {}
        if str(found := headers.get("Retry-After", "")).isdigit():
            return float(found)
        error = error.__cause__
    return 0.0
