"""Google Cloud Storage on this machine: what ``gcsfs`` asks of its JSON API to list and to read one bucket.

Endpoints: https://cloud.google.com/storage/docs/json_api/v1/objects (list, get).
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import md5
from pathlib import Path
from urllib.parse import parse_qs, unquote

from benchmarks.remote.failing_server import Fault, Handler

BUCKET = "ann-sets"
_API = re.compile(r"(download/)?storage/v1/b/(?P<bucket>[^/]+)/o(/(?P<object>[^/]+))?")


class Storage(Handler):
    """Answers for the bucket ``BUCKET``, whose objects are the files below a folder."""

    @property
    def _name(self) -> str:
        """Name of the object whose content is asked for, or path of an endpoint."""
        path = super()._name
        found = _API.fullmatch(path)
        return unquote(found["object"]) if found and path.startswith("download/") else path

    def _answer(self, fault: Fault | None) -> None:
        found = _API.fullmatch(super()._name)
        if fault and fault[0] == "status":
            return self._refuse(int(fault[1]))
        if found is None or found["bucket"] != BUCKET:
            return self._refuse(404)
        if found["object"] is None:
            return self._send_json(self._listing())
        path = self.served.folder / unquote(found["object"])
        if not path.is_file():
            return self._refuse(404)
        return super()._answer(fault) if found[1] else self._send_json(_object(path, self.served.folder))

    def _send_json(self, about: object) -> None:
        return self._send(json.dumps(about).encode(), "application/json")

    def _listing(self) -> dict[str, object]:
        """List the objects with a prefix, and what their names have up to a delimiter behind it."""
        query = parse_qs(self.path.partition("?")[2])
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        paths = sorted(path for path in self.served.folder.rglob("*") if path.is_file())
        objects = [_object(path, self.served.folder) for path in paths]
        items, prefixes = [], set()
        for item in objects:
            head, mark, _ = item["name"].removeprefix(prefix).partition(delimiter or "\n")
            if not item["name"].startswith(prefix):
                continue
            if mark:
                prefixes.add(prefix + head + mark)
            else:
                items.append(item)
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


def _object(path: Path, folder: Path) -> dict[str, str]:
    """Describe an object as the API does: numbers are strings, and the hash is in base 64."""
    body, stat = path.read_bytes(), path.stat()
    about = {"kind": "storage#object", "name": str(path.relative_to(folder)), "bucket": BUCKET}
    digest = b64encode(md5(body).digest()).decode()
    generation = str(stat.st_mtime_ns // 1000)
    return about | {"size": str(len(body)), "md5Hash": digest, "generation": generation}
