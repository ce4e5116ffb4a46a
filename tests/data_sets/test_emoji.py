"""Emoji as images: names as Unicode lists them, families that stay together, drawings of a font."""

import json

import numpy as np
import pytest
import webdataset
from comparing import error_of
from PIL import Image

from data import emoji

LIST = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600      ; fully-qualified     # \U0001f600 E1.0 grinning face
263A FE0F  ; fully-qualified     # \u263a\ufe0f E0.6 smiling face
263A                                       ; unqualified         # \u263a E0.6 smiling face
# subgroup: person-activity
1F3C3      ; fully-qualified     # \U0001f3c3 E0.6 person running
1F3C3 1F3FB ; fully-qualified     # \U0001f3c3\U0001f3fb E1.0 person running: light skin tone
1F3C3 200D 2640 FE0F ; fully-qualified     # \U0001f3c3\u200d\u2640\ufe0f E4.0 woman running
# subgroup: country-flag
1F1E6 1F1E9 ; fully-qualified     # \U0001f1e6\U0001f1e9 E2.0 flag: Andorra
1F1E6 1F1EA ; fully-qualified     # \U0001f1e6\U0001f1ea E2.0 flag: United Arab Emirates
"""


@pytest.fixture
def names(tmp_path):
    (tmp_path / "emoji-test.txt").write_text(LIST, encoding="utf-8")
    return tmp_path / "emoji-test.txt"


def test_names_are_those_of_fully_qualified_emoji(names):
    found = emoji.read_names(names)
    assert [each.name for each in found] == [
        "grinning face", "smiling face", "person running", "woman running", "flag: Andorra",
        "flag: United Arab Emirates",
    ]  # fmt: skip
    assert found[1].text == "\u263a\ufe0f" and found[3].subgroup == "person-activity"
    assert "person running: light skin tone" in [
        each.name for each in emoji.read_names(names, skin_tones=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_alike_is_on_one_side_of_the_split(names, seed):
    found = emoji.read_names(names, skin_tones=True)
    sides = emoji.split(found, 0.4, seed)
    assert sorted(sides["train"] + sides["val"]) == list(range(len(found))) and all(sides.values())
    families = {name: {found[i].family for i in rows} for name, rows in sides.items()}
    assert not families["train"] & families["val"]
    assert len({each.family for each in found if "running" in each.name}) == 1
    assert len({each.family for each in found if "flag" in each.name}) == 2


def test_the_first_view_is_on_white_and_others_are_a_function_of_their_seed():
    drawing = Image.new("RGBA", (136, 128), (255, 0, 0, 255))
    plain = np.asarray(emoji.view(drawing, 64, None))
    assert plain.shape == (64, 64, 3) and (plain[0] == 255).all() and (plain[32, 32] == [255, 0, 0]).all()
    views = [np.asarray(emoji.view(drawing, 64, np.random.default_rng([0, n]))) for n in (1, 1, 2)]
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--font", "nowhere.ttf"], "--font: 'nowhere.ttf' does not exist, expected a font"),
        (["--font", "{names}"], "has no bitmaps of 109 pixels"),
        (["--views", "0"], "--views: 0, expected 1 to 1000"),
        (["--size", "7"], "--size: 7, expected 8 to 512"),
        (["--val-fraction", "1"], "--val-fraction: 1.0, expected a number between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(names, tmp_path, capsys, given, says):
    given = [each.format(names=names) for each in given]
    assert says in error_of(
        capsys, ["--out", str(tmp_path / "out"), "--names", str(names), *given], emoji.main
    )
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_none_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--names: '.*x\.txt' does not exist, .*unicode-data"):
        emoji.read_names(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text("1F600 ; emoji")
    with pytest.raises(ValueError, match=r"x\.txt' lists no emoji, expected Unicode's emoji-test\.txt"):
        emoji.read_names(tmp_path / "x.txt")


@pytest.mark.skipif(not emoji.FONT.is_file(), reason="needs Debian's fonts-noto-color-emoji")
def test_a_font_is_packed_once(names, tmp_path, capsys):
    arguments = [
        "--out",
        str(tmp_path / "out"),
        "--names",
        str(names),
        "--views",
        "2",
        "--val-fraction",
        "0.4",
    ]
    assert emoji.main(arguments) == emoji.main(arguments) == 0
    output = capsys.readouterr().out
    assert "already packed" in output
    assert output.count(": 6 train and 6 val images in 2 shards, 0.1 MB\nnext: python -m ldm.fit") == 2
    shards = {name: tmp_path / "out" / f"{name}-000000.tar" for name in ("train", "val")}
    found = {
        name: list(webdataset.WebDataset(str(path), shardshuffle=False)) for name, path in shards.items()
    }
    assert sum(map(len, found.values())) == 12
    images = {sample["__key__"]: sample["png"] for samples in found.values() for sample in samples}
    assert len(set(images.values())) == 12
    said = {sample["txt"].decode(): json.loads(sample["json"]) for sample in found["train"] + found["val"]}
    assert said["flag: Andorra"] == {"label": 2, "subgroup": "country-flag", "emoji": "\U0001f1e6\U0001f1e9"}
    assert emoji.Drawings(emoji.FONT).draw("\U0001f600\U0001f600") is None
