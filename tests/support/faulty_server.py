"""A web server with ranges and ETags, or without, that on demand cuts connections, refuses and delays."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = tuple[str, float]
"""What goes wrong: ("cut", share of the bytes that come), ("status", code), ("slow", seconds)."""


@dataclass
class Served:
    """What is served, and what was asked for.

    Args:
        folder: Its files.
        ranges: Whether requests for ranges are understood.
        etags: Whether files have ETags.
        fault: Gives what goes wrong with the n-th GET (from 0) of a file, or None.
    """

    folder: Path
    ranges: bool = True
    etags: bool = True
    fault: Callable[[str, int], Fault | None] = lambda name, count: None
    gets: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Name to the bytes sent in answer to each GET."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(None)

    def do_GET(self):
        name = self.path.partition("?")[0].lstrip("/")
        with self.served.lock:
            count = len(self.served.gets[name])
            self.served.gets[name].append(0)
        sent = self.answer(self.served.fault(name, count))
        with self.served.lock:
            self.served.gets[name][count] = sent

    def answer(self, fault):
        path = self.served.folder / self.path.partition("?")[0].lstrip("/")
        kind, amount = fault or ("", 0.0)
        if kind == "slow":
            time.sleep(amount)
        if kind == "status" or not path.exists():
            return self.refuse(int(amount) if kind == "status" else 404)
        content = self.listing(path) if path.is_dir() else path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and self.served.ranges:
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            body = content[first : last + 1]
        else:
            self.send_response(200)
            body = content
        if self.served.etags:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes" if self.served.ranges else "none")
        self.send_header("Content-Type", "text/html" if path.is_dir() else "application/x-tar")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return 0
        sent = body[: int(len(body) * amount)] if kind == "cut" else body
        self.wfile.write(sent)
        if kind == "cut":
            time.sleep(0.05)  # what was sent arrives
            self.close_connection = True
        return len(sent)

    def refuse(self, code):
        self.send_response(code)
        self.send_header("Content-Length", "0")
        if code == 503:
            self.send_header("Retry-After", "0")
        self.end_headers()
        return 0

    def listing(self, folder):
        return "".join(
            f'<a href="{path.name}">{path.name}</a>\n' for path in sorted(folder.iterdir())
        ).encode()


@contextmanager
def serving(folder: Path, **more) -> Iterator[Served]:
    """Serve a folder on a free port of this machine for the length of a ``with`` block."""
    served = Served(folder, **more)
    handler = type("OfFolder", (Handler,), {"served": served})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        served.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield served
        server.shutdown()
