"""Captions and classes that a configuration gives to the samples of a set, read as if they were stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import override

from ldm.data.decode import Members, SampleId
from ldm.data.fields import FIELDS, Sample
from ldm.data.files import ShardFiles
from ldm.data.sets import TrainSet
from ldm.data.stacking import NO_SLOTS, Slots
from ldm.data.view import View


def own_members(files: ShardFiles, of: TrainSet) -> ShardFiles:
    """Give the samples of shards what their set says of them."""
    given: dict[str, bytes] = {}
    if of.caption is not None:
        given["txt"] = of.caption.encode()
    if of.label is not None:
        given["cls"] = str(of.label).encode()
    if not given and of.caption_key is None:
        return files
    return OwnMembers(files, given, of.caption_key)


class OwnMembers(ShardFiles):
    """Shards whose samples have the captions and the class of their set.

    Args:
        files: The shards as they are stored.
        given: Member to its content, the same for all samples.
        caption_key: Key of the json member that holds the caption, or a list of captions; None: as stored.
    """

    def __init__(self, files: ShardFiles, given: dict[str, bytes], caption_key: str | None) -> None:
        dropped = {"txt": 0} if caption_key else {}
        summaries = [
            replace(each, present={**each.present, **dropped, **dict.fromkeys(given, each.count)})
            for each in files.summaries
        ]
        super().__init__(summaries, files.index_dir, files.cache)
        self.given, self.caption_key = given, caption_key

    @property
    def has_captions(self) -> bool:
        """Whether the captions are those of the set."""
        return self.caption_key is not None or "txt" in self.given

    @override
    def sample(
        self,
        shard: int,
        row: int,
        fields: Sequence[str],
        view: View,
        optional: Sequence[str] = (),
        classes: Mapping[str, int] | None = None,
        slots: Slots = NO_SLOTS,
    ) -> Sample:
        if self.has_captions:  # not those that data.augment.captions draws among
            view = replace(view, captions=())
        return super().sample(shard, row, fields, view, optional, classes, slots)

    @override
    def members(
        self, shard: int, row: int, names: Iterable[str], limit: int | None = None
    ) -> tuple[dict[str, bytes], SampleId]:
        asked = list(names)
        found, sample = super().members(shard, row, asked, limit)
        if self.has_captions:
            found.pop("txt", None)
            if "json" in found:
                found["json"] = self._captioned(Members(found, sample).json())
        return {**found, **{name: body for name, body in self.given.items() if name in asked}}, sample

    def _captioned(self, meta: dict[str, Any]) -> bytes:
        """Return the json member with the captions of this set where captions belong."""
        captions = meta.get(self.caption_key) if self.caption_key else None
        for key in FIELDS["text"].json_keys:
            meta.pop(key, None)
        if captions is not None:
            meta["captions" if isinstance(captions, list) else "caption"] = captions
        return json.dumps(meta).encode()
