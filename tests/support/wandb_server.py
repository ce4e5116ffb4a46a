"""A stand-in for W&B's server on loopback: what the client of wandb 0.31 asks of it, kept in memory.

Like the real one it keeps history at the offset that the client names, and answers a resumed run with its
last row. Unlike the real one it has one user, takes any key of 40 characters, hands out no URLs of a bucket
but its own, knows no quota of its own (see ``refusals``), and computes no summaries: the client sends them.
"""

import base64
import contextlib
import gzip
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from wandb_answers import Answers

KEY = "k" * 40
STREAMS = {
    "wandb-history.jsonl": "history",
    "wandb-events.jsonl": "events",
    "output.log": "console",
    "wandb-summary.json": "summaries",
}


@dataclass
class Run:
    """What the server knows of a run."""

    name: str
    project: str = "ldm"
    lines: dict[str, list] = field(default_factory=lambda: {kind: [] for kind in STREAMS.values()})
    config: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    sent: int = 0

    @property
    def rows(self):
        """Rows of the history, in the server's order."""
        return [json.loads(line) for line in self.lines["history"]]

    @property
    def summary(self):
        summaries = self.lines["summaries"]
        return json.loads(summaries[-1]) if summaries else {}

    @property
    def settings(self):
        """The config without W&B's own part."""
        return {name: item["value"] for name, item in self.config.items() if name != "_wandb"}

    def write(self, kind, offset, content):
        lines = self.lines[kind]
        assert offset <= len(lines) or kind == "console", (
            f"a gap in {kind}: {len(lines)} lines, then {offset}"
        )
        lines[offset : offset + len(content)] = content


@dataclass
class Sweep:
    """A sweep whose trials are given.

    Args:
        config: Its YAML.
        trials: Names of runs, with their parameters, to be trained.
        stopped: Names of runs that their agent is to stop.
    """

    config: str
    trials: list[tuple[str, dict]]
    stopped: set[str] = field(default_factory=set)


class Server:
    """The server, while its ``with`` block lasts.

    ``mode`` is how it answers from now on: "well"; "silent", never, until the mode changes; "cut", by closing
    connections; or a status such as 429 or 500. ``delay`` is in seconds. ``refusals`` maps a part of a query
    to the message of the error that it gets. ``stop`` and ``start`` are those of the whole server.
    """

    def __init__(self):
        self.runs, self.deleted, self.refusals = {}, set(), {}
        self.agents, self.sweeps, self.artifacts, self.views = {}, {}, {}, []
        self.mode, self.delay = "well", 0.0
        self.asked, self.fetched = [], []
        self.lock = threading.RLock()
        self._http, self.port = None, 0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.mode = "cut"
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self):
        """Variables that have the client send here, for one key, and try as the defaults do."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def start(self):
        handler = type("Bound", (Handler,), {"store": self})
        self._http = _Threads(("127.0.0.1", self.port), handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        """Refuse connections from now on, and cut those that are there."""
        if self._http is not None:
            self._http.shutdown()
            self._http.close_all()
            self._http = None

    def wait_for(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s"
            time.sleep(0.02)

    def keep_artifact(self, name, files, aliases=(), metadata=None):
        """Keep a version as if a client had sent it; returns its digest.

        Args:
            name: Of its collection, in project ldm.
            files: Contents by name.
            aliases: Of the version, beside "latest".
            metadata: Of the artifact.
        """
        contents = {path: {"digest": _md5(data), "size": len(data)} for path, data in files.items()}
        given = {"entityName": None, "projectName": "ldm", "artifactCollectionName": name}
        given |= {"artifactTypeName": "model", "description": None, "historyStep": None, "runName": None}
        listed = "".join(f"{path}:{contents[path]['digest']}\n" for path in sorted(contents))
        given |= {"digest": _md5(f"wandb-artifact-manifest-v1\n{listed}".encode(), hexadecimal=True)}
        given |= {"aliases": [{"alias": alias} for alias in ["latest", *aliases]]}
        made = Answers(self).new_artifact({"input": given | {"metadata": json.dumps(metadata or {})}})
        number = made["createArtifact"]["artifact"]["id"]
        self.artifacts[number]["state"] = "COMMITTED"
        manifest = {"version": 1, "storagePolicy": "wandb-storage-policy-v1", "contents": contents}
        manifest["storagePolicyConfig"] = {"storageLayout": "V2"}
        self.run(number).files = {**files, "manifest": json.dumps(manifest).encode()}
        return given["digest"]

    def run(self, name):
        return self.runs.setdefault(name, Run(name))


def _md5(data, hexadecimal=False):
    found = hashlib.md5(data)
    return found.hexdigest() if hexadecimal else base64.b64encode(found.digest()).decode()


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *args):
        self.open = set()
        super().__init__(*args)

    def process_request(self, request, address):
        self.open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def close_all(self):
        self.server_close()
        for request in list(self.open):
            with contextlib.suppress(OSError):
                request.shutdown(2)

    def handle_error(self, request, address):
        """The client cuts connections as it pleases."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Server

    def log_message(self, *args):
        pass

    def body(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.size = len(raw)
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def answer(self, data, code=200):
        out = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def is_out_of_order(self):
        """Answer as the server's mode wants, if not well."""
        store = self.store
        time.sleep(store.delay)
        while store.mode == "silent":
            time.sleep(0.02)
        if store.mode == "cut":
            self.close_connection = True
            self.connection.close()
        elif isinstance(store.mode, int):
            self.answer({"errors": [{"message": f"status {store.mode}"}]}, store.mode)
        return store.mode != "well"

    def do_GET(self):
        if self.is_out_of_order():
            return
        _, kind, run, name = [*self.path.split("/", 3), "", ""][:4]
        self.store.fetched.append((run, name))
        found = self.store.runs[run].files.get(name) if kind == "upload" and run in self.store.runs else None
        self.answer({} if found is None else found, 404 if found is None else 200)

    def do_PUT(self):
        content = self.body()
        if self.is_out_of_order():
            return
        _, _, run, name = self.path.split("/", 3)
        with self.store.lock:
            kept = self.store.run(run)
            kept.files[name] = content
            kept.sent += self.size
        self.answer({})

    def do_POST(self):
        content = self.body()
        if self.is_out_of_order():
            return
        if "file_stream" in self.path:
            return self.stream(json.loads(content or b"{}"))
        query = json.loads(content)
        text, variables = query.get("query", ""), query.get("variables") or {}
        for part, message in self.store.refusals.items():
            if part in text:
                return self.answer({"data": None, "errors": [{"message": message}]})
        with self.store.lock:
            operation = re.search(r"(?:query|mutation)\s+(\w+)", text)
            self.store.asked.append((operation[1] if operation else "?", variables))
            self.answer({"data": Answers(self.store).to(text, variables)})

    def stream(self, data):
        name = self.path.rstrip("/").split("/")[-2]
        with self.store.lock:
            run = self.store.run(name)
            run.sent += self.size
            for file, part in (data.get("files") or {}).items():
                if file in STREAMS and part.get("content"):
                    run.write(STREAMS[file], part.get("offset", 0), part["content"])
            if "complete" in data:
                run.exits.append(data.get("exitcode"))
        self.answer({"exitcode": None, "limits": {}})
