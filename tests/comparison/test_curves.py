"""Figures for Plotly are valid and have the numbers of the runs."""

import plotly.graph_objects as go
import pytest

from ldm.comparison.curves import MAX_POINTS, line, panels, shortened
from ldm.comparison.runs import ComparedRun

POINTS = [(0.0, 1.0), (50.0, 10.0), (100.0, 100.0)]


def run(name="a", **curves):
    named = {name.replace("__", "/"): points for name, points in curves.items()}
    return ComparedRun(name, {}, {}, named, {}, {}, {})


def test_training_and_validation_curves_of_all_runs_are_in_one_panel():
    found = panels([run("a", train__loss=POINTS, val__loss=POINTS), run("b", val__loss=POINTS[:2])])
    assert [panel["title"] for panel in found] == ["loss"]
    assert [(trace["name"], trace["meta"], trace["mode"]) for trace in found[0]["data"]] == [
        ("a", 0, "lines"),
        ("a (val)", 0, "lines+markers"),
        ("b (val)", 1, "lines+markers"),
    ]
    assert found[0]["data"][0]["x"] == [x for x, _ in POINTS]
    assert found[0]["data"][0]["y"] == [y for _, y in POINTS]


def test_plotly_knows_every_word():
    for panel in panels([run(val__loss=POINTS, train__accuracy=POINTS)]):
        go.Figure(panel["data"], panel["layout"])


def test_the_loss_is_first_and_the_machine_last():
    names = ("train__images_per_second", "train__accuracy", "val__loss", "train__data_wait")
    found = panels([run(**dict.fromkeys(names, POINTS))])
    assert [panel["title"] for panel in found] == ["loss", "accuracy", "images_per_second"]


def test_the_edge_is_the_page_s_not_the_run_s():
    found = panels([run(val__loss=POINTS), run("b", val__accuracy=[(400.0, 1.0)])])
    assert [panel["layout"]["xaxis"]["range"] for panel in found] == [[0, pytest.approx(404)]] * 2


def test_values_that_are_not_positive_have_no_logarithm():
    found = panels([run(val__loss=POINTS, val__kl=[(0.0, 0.0), (1.0, 2.0)])])
    assert {panel["title"]: panel["positive"] for panel in found} == {"loss": True, "kl": False}


def test_names_are_text():
    (panel,) = panels([run("<b>a</b> & b", val__loss=POINTS)])
    assert panel["data"][0]["name"] == "&lt;b&gt;a&lt;/b&gt; &amp; b (val)"


def test_long_curves_are_averaged_and_keep_their_end():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    found = shortened(points, most=100)
    assert len(found) == 100 and found[-1][0] == 999.0
    assert all(y == 0.5 for _, y in found)
    assert shortened(points, most=1000) == points
    (panel,) = panels([run(train__loss=points)])
    assert len(panel["data"][0]["x"]) <= MAX_POINTS


def test_twenty_four_runs_have_lines_of_their_own():
    assert len({tuple(line(number).items()) for number in range(24)}) == 24
    assert line(24) == line(0)
