"""The page as a browser gets it, and as one shows it."""

import re
import subprocess
from html.parser import HTMLParser

import pytest

from ldm import compare
from ldm.comparison.page import best, measured_otherwise, thinned
from ldm.comparison.runs import Evaluated


class Seen(HTMLParser):
    """Collects tags with their attributes, and the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("style", "script"):
            self.text.append(data)


@pytest.fixture
def two(folders):
    wider = {"model": {"class_path": "a.B", "init_args": {"lr": 5e-3, "name": "<script>alert(1)</script>"}}}
    record = {"samples": 128, "name": "val/fid/x", "value": 2.5, "num": 5000, "extractor": "<b>"}
    return [
        folders.make("a", [0.5, 0.25], seen=(64, 128)),
        folders.make("b", [0.4, 0.2, 0.1], wider, seen=(64, 192), record=record),
    ]


def written(tmp_path, runs, *more):
    out = tmp_path / "compare.html"
    assert compare.main([*map(str, runs), f"--out={out}", *more]) == 0
    return out


def test_the_page_needs_nothing_but_itself(tmp_path, two):
    text = written(tmp_path, two).read_text()
    for _, attributes in Seen(text).tags:
        assert not {"href", "srcset"} & attributes.keys()
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
    assert "http" not in text and "@import" not in text and "url(" not in text


def test_what_runs_say_cannot_become_part_of_the_page(tmp_path, two):
    text = written(tmp_path, two).read_text()
    assert len(re.findall("<script", text)) == 1
    seen = Seen(text)
    assert "<script>alert(1)</script>" in seen.text and "<b>" in seen.text


def test_differences_values_and_records_are_there(tmp_path, two):
    said = Seen(written(tmp_path, two).read_text()).text
    assert "model.lr" in said and "0.001" in said and "0.005" in said
    assert "git.revision" in said and "python" not in said  # only what differs
    assert {"num", "5000", "2.5"} <= set(said)
    assert "0.25" in said and "0.1" in said


def test_every_run_has_a_curve_in_each_panel_that_it_logged(tmp_path, two):
    tags = Seen(written(tmp_path, two).read_text()).tags
    names = [attributes["data-name"] for tag, attributes in tags if "data-name" in attributes]
    for name in ("a", "b", "a (val)", "b (val)"):
        assert names.count(name) >= 2  # linear and logarithmic


def test_twenty_runs_and_one(tmp_path, folders):
    runs = [folders.make(f"{'long-' * 20}{i}", [1.0 / (i + 1)], seen=()) for i in range(20)]
    strokes = set(
        re.findall(r'class="curve val run-\d+"[^>]*?(stroke="[^>]*)>', written(tmp_path, runs).read_text())
    )
    assert len(strokes) == 20
    assert "Settings that differ" not in written(tmp_path, runs[:1]).read_text()


def test_the_best_is_known_only_where_the_name_says_which_end_is_good():
    assert best("val/fid/x", [3.0, 2.0, None]) == 2.0
    assert best("val/clip_score/x", [30.0, 31.0]) == 31.0
    assert best("val/temperature", [1.0, 2.0]) is None
    assert best("val/fid/x", [3.0, None]) is None and best("val/fid/x", [3.0, 3.0]) is None


def test_images_are_thinned_evenly_with_the_last():
    assert thinned([1, 2, 3], 5) == [1, 2, 3]
    assert thinned(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert thinned([7, 8, 9], 1) == [9]


def test_a_bad_folder_is_one_line(tmp_path, capsys):
    assert compare.main([str(tmp_path / "nowhere"), f"--out={tmp_path / 'c.html'}"]) == 2
    assert "nowhere' is no run folder" in capsys.readouterr().err
    assert not (tmp_path / "c.html").exists()


def test_a_browser_shows_the_newest_samples_of_each_run(tmp_path, two, programs):
    (browser,) = programs("chromium", "chromium")
    out = written(tmp_path, two)
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    dom = subprocess.run(
        [*command, "--dump-dom", out.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    tags = Seen(dom).tags
    shown = [
        attributes["alt"]
        for tag, attributes in tags
        if tag == "img" and "shown" in attributes.get("class", "")
    ]
    assert shown == ["a at 128", "b at 192"]
    assert '<b id="seen-now">192</b>' in dom
    assert dom.count('class="tip"') == dom.count("<svg class=")


def test_values_that_were_measured_in_different_ways_are_not_ranked():
    few, many = (Evaluated(1.0, {"num": num, "guidance": num, "reference": "a"}) for num in ("10", "5000"))
    same = Evaluated(1.0, {**few.record, "guidance": "none"})
    assert measured_otherwise([few, many, None]) == ["num"]
    assert measured_otherwise([few, same]) == measured_otherwise([None, few]) == []


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [("fid/x", [1.0, 2.0], 1.0), ("fid/x@often", [1.0, 2.0], 1.0), ("fid_floor/x", [1.0, 2.0], None),
     ("kid_std/x", [1.0, 2.0], None), ("kid/x", [1.0, 2.0], 1.0), ("map/objects", [1.0, 2.0], 2.0)],
)  # fmt: skip
def test_a_good_end_is_that_of_the_measure_and_not_of_what_goes_with_it(name, values, expected):
    assert best(f"val/{name}", values) == expected
