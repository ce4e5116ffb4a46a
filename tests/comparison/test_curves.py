"""The numbers of a panel are where they should be."""

import json
import re
from html import unescape
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from ldm.comparison.curves import HEIGHT, LEFT, RIGHT, WIDTH, Curve, panel, short, shortened, ticks

POINTS = [(0.0, 1.0), (50.0, 10.0), (100.0, 100.0)]


def drawings(points, end=100.0):
    figure = ElementTree.fromstring(panel("a <value>", [Curve(3, 'a & "b"', points, True)], end))
    assert figure.find("figcaption").text == "a <value>"
    return {svg.get("class"): svg for svg in figure.iter("svg")}


def places(svg):
    return [tuple(map(float, pair.split(","))) for pair in svg.find(".//polyline").get("points").split()]


def test_a_linear_panel_is_affine_and_a_logarithmic_one_spaces_powers_evenly():
    both = drawings(POINTS)
    for svg in both.values():
        xs = [x for x, _ in places(svg)]
        assert xs == pytest.approx([LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT], abs=0.1)
    (_, a), (_, b), (_, c) = places(both["linear"])
    assert (a - b) / (b - c) == pytest.approx(9 / 90, rel=0.05)
    (_, a), (_, b), (_, c) = places(both["log"])
    assert a - b == pytest.approx(b - c, abs=0.2) and 0 < c < a < HEIGHT


def test_the_edge_is_the_page_s_not_the_run_s():
    last = places(drawings(POINTS, end=200.0)["linear"])[-1]
    assert last[0] == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1)


def test_values_that_are_not_positive_have_no_logarithm():
    assert set(drawings([(0.0, -1.0), (1.0, 2.0)])) == {"linear"}


def test_the_script_finds_names_and_points():
    group = drawings(POINTS)["linear"].find("g")
    assert group.get("data-name") == 'a & "b" (val)'
    assert json.loads(unescape(group.get("data-points"))) == [[x, y] for x, y in POINTS]


def test_a_single_point_and_a_flat_curve_have_room():
    for points in ([(5.0, 0.0)], [(0.0, 2.0), (9.0, 2.0)]):
        for svg in drawings(points).values():
            assert all(0 < y < HEIGHT for _, y in places(svg))


def test_long_curves_are_averaged_and_keep_their_end():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    found = shortened(points, most=100)
    assert len(found) == 100 and found[-1][0] == 999.0
    assert all(y == 0.5 for _, y in found)
    assert shortened(points, most=1000) == points


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (0.001, 0.0042), (12, 1.1e6), (5, 5)])
def test_ticks_are_few_and_round(low, high):
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 8 and all(low - 1e-9 <= mark <= high * (1 + 1e-9) for mark in marks)
    steps = {f"{b - a:.6g}" for a, b in pairwise(marks)}
    assert len(steps) <= 1 and all(re.match(r"[125]", re.sub(r"^[0.]*", "", step)) for step in steps)


def test_short_numbers():
    assert [short(x) for x in (0, 0.5, 1234, 12000, 2.5e6, -3e9)] == [
        "0",
        "0.5",
        "1.234k",
        "12k",
        "2.5M",
        "-3G",
    ]
