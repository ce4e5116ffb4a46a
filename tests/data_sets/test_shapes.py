import hashlib
import json
import tarfile
from collections import Counter

import numpy as np
import pytest

from data.shapes.packer import Settings, pack
from data.shapes.scene import (
    SPLITS,
    belongs_to,
    box,
    canonical_caption,
    is_held_out_pair,
    is_novel,
    render,
    sample_scene,
    sample_scenes,
    sample_wording,
    training_captions,
)

SCENES = [sample_scene(0, i) for i in range(2000)]


def test_a_scene_is_a_function_of_seed_and_index():
    assert [sample_scene(0, i) for i in range(20)] == SCENES[:20]
    assert [sample_scene(1, i) for i in range(20)] != SCENES[:20]


def test_frequencies_are_those_of_the_specification():
    pairs = np.mean([len(s.outlines) == 2 for s in SCENES])
    assert abs(pairs - 0.7) < 0.035  # three standard deviations of 2,000 draws
    assert abs(np.mean([is_novel(s) for s in SCENES]) - 26 / 256) < 0.02
    colours = Counter(t.colour for s in SCENES for t in s.description.things)
    assert len(colours) == 8 and max(colours.values()) < 1.25 * min(colours.values())
    wordings = [sample_wording(s, 0, i) for i, s in enumerate(SCENES)]
    assert abs(np.mean(["background" in w for w in wordings]) - 0.7) < 0.035
    mirrored = [
        ("right of" in w or "below" in w)
        for s, w in zip(SCENES, wordings, strict=True)
        if len(s.outlines) == 2
    ]
    assert abs(np.mean(mirrored) - 0.5) < 0.045


def test_the_hash_decides_which_scenes_are_novel():
    for scene in SCENES[:200]:
        digest = hashlib.sha256(canonical_caption(scene).encode()).digest()
        assert is_novel(scene) == (digest[0] < 26)


def test_no_caption_of_training_is_in_another_split():
    drawn = {split: sample_scenes(0, split, 300) for split in SPLITS}
    trained = {c for s in drawn["train"] for c in training_captions(s)}
    for split in ("novel", "pairs"):
        captions = [canonical_caption(s) for s in drawn[split]]
        assert len(set(captions)) == len(captions), "every caption once"
        assert not trained & set(captions)
    assert all(belongs_to(s, "train") for s in drawn["val"])
    assert not any(is_held_out_pair(s) for s in drawn["novel"])


def test_objects_lie_in_their_boxes_and_nowhere_else():
    for scene in SCENES[:100]:
        image = render(scene, 64).astype(int)
        differs = np.abs(image - np.array(scene.background_rgb)).max(-1) > 8
        for thing, outline in zip(scene.description.things, scene.outlines, strict=True):
            left, top, right, bottom = box(thing.shape, outline, 64)
            inside = np.zeros_like(differs)
            inside[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = True
            assert (differs & inside).any()
            differs &= ~inside
        assert not differs.any()


def test_sizes_of_the_canvas_show_the_same_scene():
    scene = SCENES[0]
    small, large = render(scene, 32).astype(float), render(scene, 128).astype(float)
    shrunk = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(small - shrunk).mean() < 1.0


def test_packed_shards_are_the_same_bytes_each_time_and_keep_the_contract(tmp_path):
    settings = Settings(train=20, val=4, novel=4, pairs=4, shard_size=8)
    for name in ("a", "b"):
        pack(tmp_path / name, settings, workers=2)
    tars = sorted(p.name for p in (tmp_path / "a").glob("*.tar"))
    assert tars[:3] == ["novel-000000.tar", "pairs-000000.tar", "train-000000.tar"]
    for name in tars:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        names = tar.getnames()
        assert len(names) == 24 and {n.split(".")[1] for n in names} == {"png", "txt", "json"}
        meta = json.load(tar.extractfile(next(n for n in names if n.endswith("json"))))
    assert meta["captions"] and meta["scene"]


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    pack(tmp_path, Settings(train=4, val=4, novel=4, pairs=4), workers=1)
    with pytest.raises(ValueError, match="packed with train=4 instead of 8"):
        pack(tmp_path, Settings(train=8, val=4, novel=4, pairs=4), workers=1)
