"""The page as a browser gets it, and as one shows it."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from ldm import compare
from ldm.comparison.page import _values, best, measured_otherwise, thinned, validated_otherwise
from ldm.comparison.runs import EvaluationRecord, read_runs
from ldm.loggers.metrics_csv import MetricsCSV
from ldm.runs.settings import flat

HOVER = """
const area = document.querySelector('.plot .nsewdrag'), box = area.getBoundingClientRect();
const where = { bubbles: true, clientX: box.left + box.width * .3, clientY: box.top + box.height / 2 };
['mouseover', 'mousemove'].forEach(name => area.dispatchEvent(new MouseEvent(name, where)));
"""
"""Point at the first panel, near the first of its three moments."""


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
            self.text.append(data.strip())


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


@pytest.fixture
def browse(programs, tmp_path):
    """Open a page in a browser, let it run a script once it has loaded, and return what is there then."""
    (browser,) = programs("chromium", "chromium")

    def browse(page, script=""):
        start, copy = "<meta charset", tmp_path / "browsed.html"
        watch = (
            "const say = text => document.documentElement.append(text);"
            "addEventListener('error', e => say('ERROR ' + e.message));"
            "addEventListener('securitypolicyviolation', e => say('REFUSED ' + e.blockedURI));"
        )
        added = f"<script>{watch} addEventListener('load', () => {{ {script} }})</script>"
        copy.write_text(page.read_text().replace(start, added + start, 1))
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"),
        ]
        done = subprocess.run(
            [browser, *options, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        seen = Seen(done.stdout)
        assert not [text for text in seen.text if text.startswith("ERROR")]
        return seen

    return browse


def lines(seen):
    """The style of each drawn curve; the read-out under the mouse repeats some as legend."""
    styles = [a["style"] for tag, a in seen.tags if tag == "path" and a.get("class") == "js-line"]
    return [style for style in styles if "vector-effect" in style]


def images(seen):
    return [a["alt"] for tag, a in seen.tags if tag == "img" and "hidden" not in a]


def test_the_page_needs_nothing_but_itself(tmp_path, two):
    text = written(tmp_path, two).read_text()
    for _, attributes in Seen(text).tags:
        assert not {"href", "srcset"} & attributes.keys()
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
    assert len(text) < 6e6


@pytest.mark.slow
def test_a_browser_requests_nothing_and_the_policy_forbids_it(tmp_path, two, browse):
    page = written(tmp_path, two)
    assert not [text for text in browse(page, HOVER).text if "REFUSED" in text]
    load = "new Image().src = 'http://127.0.0.1:9/a.png'; fetch('http://127.0.0.1:9/b').catch(() => 0);"
    refused = "".join(browse(page, load).text)
    assert "REFUSED http://127.0.0.1:9/a.png" in refused and "REFUSED http://127.0.0.1:9/b" in refused


def test_text_of_runs_is_escaped(tmp_path, two, folders):
    hostile = folders.make("<b onclick=x>", [0.3, float("nan")], {"</script>": "<img src=x>"}, seen=())
    seen = Seen(written(tmp_path, [*two, hostile]).read_text())
    tags = [tag for tag, _ in seen.tags]
    assert tags.count("script") == 2 and not any("onclick" in attributes for _, attributes in seen.tags)
    assert {"<script>alert(1)</script>", "<b onclick=x>", "</script>", "<img src=x>"} <= set(seen.text)


def test_differences_values_and_records_are_there(tmp_path, two):
    text = Seen(written(tmp_path, two).read_text()).text
    assert "model.lr" in text and "0.001" in text and "0.005" in text
    assert "git.revision" in text and "python" not in text  # only what differs
    assert {"num: 5000", "extractor: <b>"} <= set(text) and "2.5" in text
    assert {"0.25", "0.1"} <= set(text)


@pytest.mark.slow
def test_a_browser_draws_every_curve_and_reads_it_out(tmp_path, two, browse):
    seen = browse(written(tmp_path, two), HOVER)
    assert len(lines(seen)) == 6  # train/loss, val/loss and val/fid of two runs
    read = "|".join(filter(None, seen.text))
    for run in ("a", "a (val)", "b", "b (val)"):
        assert f"{run} : " in read
    assert "1.5 at 64" in read


@pytest.mark.slow
def test_a_run_is_hidden_in_curves_and_samples(tmp_path, two, browse):
    seen = browse(written(tmp_path, two), "document.querySelectorAll('.legend input')[0].click();")
    assert len(lines(seen)) == 3
    figures = [a for tag, a in seen.tags if tag == "figure" and a.get("class") == "samples"]
    assert ["hidden" in figure for figure in figures] == [True, False]


@pytest.mark.slow
def test_the_axis_becomes_logarithmic_where_values_are_positive(tmp_path, folders, browse):
    page = written(tmp_path, [folders.make("a", [1e-4, 1.0, 1e4]), folders.make("b", [-5.0])])
    report = "plots.map(p => [p.layout.yaxis.type, p._fullLayout.yaxis.type].join())"
    script = f"document.getElementById('log').click(); const plots = all('.plot'); document.title = {report};"
    title = next(text for text in browse(page, script).text if "linear" in text)
    assert title == "linear,linear,linear,linear"
    page = written(tmp_path, [folders.root / "a"])
    assert "log,log,log,log" in browse(page, script).text


@pytest.mark.slow
def test_twenty_runs_and_one(tmp_path, folders, browse):
    runs = [folders.make(f"{'long-' * 20}{i}", [1.0 / (i + 1)] * 2, seen=()) for i in range(20)]
    seen = browse(written(tmp_path, runs))
    assert len({re.sub("stroke-width[^;]*;|opacity[^;]*;", "", style) for style in lines(seen)}) == 20
    swatches = [" ".join(attributes["style"].split()) for tag, attributes in seen.tags if tag == "i"]
    assert len(swatches) == len(set(swatches)) == 20
    assert "Settings that differ" not in written(tmp_path, runs[:1]).read_text()


@pytest.mark.slow
def test_a_run_that_has_logged_nothing(tmp_path, folders, browse):
    folder = folders.make("a", [1.0], seen=())
    (folder / "metrics.csv").unlink()
    assert "No run has logged a value yet." in browse(written(tmp_path, [folder])).text


def test_no_torch_is_imported(tmp_path, two):
    code = (
        "import sys; from ldm import compare; assert compare.main(sys.argv[1:]) == 0;"
        "print({'torch', 'lightning', 'torchmetrics'} & set(sys.modules))"
    )
    options = [*map(str, two), f"--out={tmp_path / 'c.html'}"]
    command = [sys.executable, "-c", code, *options]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("set()\n")


def test_the_best_is_marked_only_where_runs_state_one_direction():
    assert best([3.0, 2.0, None], ["min", "min"]) == 2.0
    assert best([30.0, 31.0], ["max"]) == 31.0
    assert best([1.0, 2.0], []) is best([1.0, 2.0], ["min", "max"]) is None
    assert best([3.0, None], ["min"]) is best([3.0, 3.0], ["min"]) is None


def test_images_are_thinned_evenly_with_the_last():
    assert thinned([1, 2, 3], 5) == [1, 2, 3]
    assert thinned(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert thinned([7, 8, 9], 1) == [9]


def test_a_bad_folder_is_one_line(tmp_path, capsys):
    assert compare.main([str(tmp_path / "nowhere"), f"--out={tmp_path / 'c.html'}"]) == 2
    assert "nowhere' is no run folder" in capsys.readouterr().err
    assert not (tmp_path / "c.html").exists()


@pytest.mark.slow
def test_a_browser_shows_the_newest_samples_of_each_run(tmp_path, two, browse):
    page = written(tmp_path, two)
    seen = browse(page)
    assert images(seen) == ["a at 128", "b at 192"] and "192" in seen.text
    move = "slider.value = 0; slider.dispatchEvent(new Event('input', {bubbles: true}));"
    assert images(browse(page, move)) == ["a at 64", "b at 64"]


def test_values_that_were_measured_in_different_ways_are_not_ranked():
    few, many = (
        EvaluationRecord(1.0, {"num": num, "guidance": num, "reference": "a"}) for num in ("10", "5000")
    )
    same = EvaluationRecord(1.0, {**few.record, "guidance": "none"})
    assert measured_otherwise([few, many, None]) == ["num"]
    assert measured_otherwise([few, same]) == measured_otherwise([None, few]) == []


DIFFUSION = {
    "model": {
        "class_path": "Diffusion",
        "init_args": {
            "objective": {"prediction": "Velocity"},
            "latents": {"class_path": "AutoencoderLatents", "init_args": {"checkpoint": "a"}},
            "optimizer": {"lr": 1},
        },
    }
}


@pytest.mark.parametrize(
    ("key", "value", "differs"),
    [
        ("class_path", "Autoencoder", ["model"]),
        ("objective", {"prediction": "Epsilon"}, ["model.objective.prediction"]),
        ("latents", {"class_path": "AutoencoderLatents", "init_args": {"checkpoint": "b"}}, ["checkpoint"]),
        ("latents", "Pixels", ["model.latents"]),
        ("optimizer", {"lr": 2}, []),
    ],
)
def test_losses_of_other_stages_objectives_and_latents_are_not_ranked(folders, key, value, differs):
    other = {"model": {**DIFFUSION["model"], "init_args": dict(DIFFUSION["model"]["init_args"])}}
    (other["model"] if key == "class_path" else other["model"]["init_args"])[key] = value
    runs = read_runs([str(folders.make("a", [0.5], DIFFUSION)), str(folders.make("b", [0.1], other))])
    loss = next(row for row in _values(runs) if row["name"] == "val/loss")
    assert [name for name in differs if not any(name in found for found in loss["unlike"])] == []
    assert loss["best"] == (None if differs else 0.1)


def test_values_of_other_validation_samples_are_not_ranked(folders):
    """Without a record the settings say so; with one its filter does."""
    one, other = (_flatten({"data": {"val_filter": text}}) for text in (None, "score > 3"))
    assert validated_otherwise("val/psnr", [one, other]) == ["data.val_filter"]
    records = [EvaluationRecord(1.0, {"num": "8", **more}) for more in ({}, {"filter": "score > 3"})]
    assert measured_otherwise(records) == ["filter"]


def test_other_values_of_a_stage_are_ranked_whatever_its_losses_are(folders):
    one, other = ({"model": {"class_path": "Autoencoder", "init_args": {"kl_weight": w}}} for w in (1, 2))
    assert validated_otherwise("val/loss", [_flatten(one), _flatten(other)]) == ["model.kl_weight"]
    assert validated_otherwise("val/psnr", [_flatten(one), _flatten(other)]) == []


@pytest.mark.parametrize(("pairs", "best"), [((32, 32), 0.1), ((32, 128), None)])
def test_values_of_contrastive_stages_are_ranked_among_equally_many_pairs(folders, pairs, best):
    paths = [folders.make(f"{i}", [0.5 - 0.4 * i]) for i in range(2)]
    for path, num in zip(paths, pairs, strict=True):
        MetricsCSV(str(path), dict).log_metrics({"samples": 128, "val/pairs": num}, step=2)
    loss = next(row for row in _values(read_runs([str(path) for path in paths])) if row["name"] == "val/loss")
    assert (loss["best"], loss["unlike"]) == (best, [] if best else ["val/pairs"])


def _flatten(settings):
    return {name: str(value) for name, value in flat(settings)}
