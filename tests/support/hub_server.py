"""A Hugging Face Hub on this machine: what ``HfFileSystem`` asks of it to list and to read one dataset.

Endpoints: https://huggingface.co/docs/hub/api. Of the dataset's revisions only ``main`` is there.
"""

from __future__ import annotations

import json
import re
from hashlib import sha1, sha256
from pathlib import Path
from urllib.parse import unquote

from benchmarks.remote.failing_server import Fault, Handler

REPOSITORY = "ann/web"
_API = re.compile(
    r"api/datasets/(?P<id>[^/]+/[^/]+)(/(?P<kind>revision|tree)/(?P<revision>[^/]+)(/(?P<path>.*))?)?"
)
_FILE = re.compile(r"datasets/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)")


class Hub(Handler):
    """Answers for the dataset ``REPOSITORY``, whose files are those of a folder; tars are stored by LFS."""

    @property
    def _name(self) -> str:
        """Path of a file in the dataset, or of an endpoint."""
        path = unquote(super()._name)
        found = _FILE.fullmatch(path)
        return found["path"] if found else path

    def _answer(self, fault: Fault | None) -> None:
        asked = unquote(super()._name)
        found = _API.fullmatch(asked) or _FILE.fullmatch(asked)
        if fault and fault[0] == "status":
            return self._refuse(int(fault[1]))
        if found is None or found["id"] != REPOSITORY:
            return self._refuse(401, "RepoNotFound")  # of a private one, too
        if found["revision"] not in (None, "main"):
            return self._refuse(404, "RevisionNotFound")
        path = self.served.folder / (found["path"] or "")
        if asked.startswith("api/"):
            return self._describe(path, lists=found["kind"] == "tree")
        return super()._answer(fault) if path.is_file() else self._refuse(404, "EntryNotFound")

    def _describe(self, path: Path, lists: bool) -> None:
        if lists and not path.is_dir():
            return self._refuse(404, "EntryNotFound")
        about = [_entry(each, self.served.folder) for each in sorted(path.iterdir())] if lists else _INFO
        return self._send(json.dumps(about).encode(), "application/json")


_INFO = {"id": REPOSITORY, "sha": "0" * 40, "siblings": [], "tags": []}


def _entry(path: Path, folder: Path) -> dict[str, object]:
    """Describe a file or a folder of the dataset as the Hub's listings do."""
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "oid": sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    body = path.read_bytes()
    lfs = {"oid": sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    entry = {"type": "file", "oid": _blob_id(body), "size": len(body), "path": name}
    return entry | ({"lfs": lfs} if path.suffix == ".tar" else {})


def _blob_id(body: bytes) -> str:
    """Return what git calls this content."""
    return sha1(b"blob %d\0" % len(body) + body).hexdigest()
