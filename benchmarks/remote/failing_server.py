"""A web server with ranges and ETags, or without, that on demand cuts connections, refuses and delays."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = tuple[str, float]
"""What goes wrong: ("cut", share of the bytes that come), ("status", code), ("slow", seconds), ("flip", 0)"""


@dataclass
class Served:
    """What is served, and what was asked for.

    Args:
        folder: Its files.
        ranges: Whether requests for ranges are understood.
        etags: Whether files have ETags.
        fault: Gives what goes wrong with the n-th GET (from 0) of a file, or None.
        gets: Name to the bytes sent in answer to each GET.
        url: Where, without a slash at the end.
    """

    folder: Path
    ranges: bool = True
    etags: bool = True
    fault: Callable[[str, int], Fault | None] = lambda name, count: None
    gets: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def etag(self, path: Path) -> str:
        """Return a hash of a file's content."""
        return sha256(path.read_bytes()).hexdigest()[:32]


class Handler(BaseHTTPRequestHandler):
    """Answers requests for the files of a folder."""

    protocol_version = "HTTP/1.1"
    served: Served
    _count = 0

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        """Answer HEAD, always well."""
        self._answer(None)

    def do_GET(self) -> None:
        """Answer GET, or fail as is wanted."""
        name = self._name
        with self.served.lock:
            count = len(self.served.gets[name])
            self.served.gets[name].append(0)
        self._count = count
        self._answer(self.served.fault(name, count))

    @property
    def _name(self) -> str:
        return self.path.partition("?")[0].lstrip("/")

    def _answer(self, fault: Fault | None) -> None:
        """Answer."""
        path, (kind, amount) = self.served.folder / self._name, fault or ("", 0.0)
        if kind == "slow":
            time.sleep(amount)
        if kind == "status" or not path.exists():
            return self._refuse(int(amount) if kind == "status" else 404)
        if path.is_dir():
            return self._send(_listing(path))
        size = path.stat().st_size
        found = (
            re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.served.ranges else None
        )
        first, last = (int(found[1]), min(int(found[2] or size), size - 1)) if found else (0, size - 1)
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Accept-Ranges", "bytes" if self.served.ranges else "none")
        self.send_header("Content-Type", "application/x-tar")
        if self.served.etags:
            self.send_header("ETag", f'"{self.served.etag(path)}"')
        with path.open("rb") as file:
            file.seek(first)
            body = bytearray(file.read(last + 1 - first))
            body[len(body) // 2] ^= kind == "flip"
            return self._send(bytes(body), None, amount if kind == "cut" else 1.0)

    def _send(self, body: bytes, content_type: str | None = "text/html", share: float = 1.0) -> None:
        """Send a body, or a share of it, after headers that begin here, unless ``content_type`` is None."""
        if content_type is not None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body[: int(len(body) * share)]
        with self.served.lock:
            self.served.gets[self._name][self._count] = len(sent)  # before the client has them
        self.wfile.write(sent)
        if share < 1:
            time.sleep(0.05)  # what was sent arrives
            self.close_connection = True

    def _refuse(self, code: int, reason: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        if reason:
            self.send_header("X-Error-Code", reason)
        if code == 503:
            self.send_header("Retry-After", "0")
        self.end_headers()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent: clients that were killed leave connections behind."""


def _listing(folder: Path) -> bytes:
    return "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in sorted(folder.iterdir())).encode()


@contextmanager
def serving(
    folder: Path,
    fault: Callable[[str, int], Fault | None] = lambda name, count: None,
    ranges: bool = True,
    etags: bool = True,
    answers: type[Handler] = Handler,
) -> Iterator[Served]:
    """Serve a folder on a free port of this machine for the length of a ``with`` block."""
    served = Served(folder, ranges, etags, fault)
    handler = type("OfFolder", (answers,), {"served": served})
    with _Server(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield served
        server.shutdown()
