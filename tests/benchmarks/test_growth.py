"""How costs grow: exponents of known functions, growth that is noticed, and a small run of each part."""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import lightning as L
import pytest
import torch

from benchmarks.growth import __main__ as growth
from benchmarks.growth import length, weights
from benchmarks.growth.line import Case, Line, grow, slope
from benchmarks.growth.measure import resident, traced

SIZES = (10, 100, 1_000, 10_000, 100_000)
TINY = {"length": (4, 6, 8), "samples": (1_000, 10_000), "shards": (9, 12), "parameters": (60_000, 250_000)}


SLOW = {"length", "parameters"}


def _line(function, expected, floor=0.0, sizes=SIZES):
    return Line(Case("x", "samples", expected, "s", sizes, function, floor), [function(n) for n in sizes])


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(exponent):
    assert slope(SIZES, [3.0 * n**exponent for n in SIZES]) == pytest.approx(exponent)


@pytest.mark.parametrize(
    ("function", "expected", "is_too_fast"),
    [
        (lambda n: 5.0, 0, False),
        (lambda n: 1.0 + 1e-3 * n, 0, True),  # at the sizes where it shows
        (lambda n: n * math.log(n), 1, False),
        (lambda n: 1e6 + n, 1, False),
        (lambda n: 1e4 + n * n, 1, True),
        (lambda n: math.log(n), 0, False),
    ],
)
def test_what_grows_faster_than_it_should_is_marked(function, expected, is_too_fast):
    line = _line(function, expected)
    assert line.is_too_fast == is_too_fast
    assert ("TOO FAST" in line.row()) == line.as_json()["is_too_fast"] == is_too_fast


def test_growth_below_the_floor_does_not_count():
    assert _line(lambda n: 1e-6 * n, 0, floor=1.0).exponent == 0
    assert _line(lambda n: 1e-6 * n, 0, floor=1e-4).is_too_fast


def test_noise_of_the_first_measurement_is_measured_again():
    seen = []

    def noisy(n):
        seen.append(n)
        return 100.0 if len(seen) == len(SIZES) else 1.0

    assert grow(Case("x", "samples", 0, "s", SIZES, noisy, 0.0)).values == [1.0] * len(SIZES)


def alone(function, *arguments):
    """Call it in a process of its own: one that has freed memory before takes less of the system."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def ones():
    return resident(lambda: torch.ones(5 * 10**6))


def test_memory_of_a_call_is_its_peak():
    assert traced(lambda: bytes(10**7) and None) == pytest.approx(10, rel=0.01)
    assert alone(ones) == pytest.approx(20, rel=0.2)


def test_parameters_are_those_asked_for():
    found = [weights.count(weights.width_of(n)) for n in (10**6, 10**7, 10**8)]
    assert found == pytest.approx([10**6, 10**7, 10**8], rel=0.15)


class Hoards(L.Callback):
    """Keeps a hundred objects and 4 MB of each step."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, *_):
        self.kept.append([torch.ones(10**6), *([self] for _ in range(100))])


def leaking(folder, marks):
    run = length.train(folder, marks, [Hoards()])
    return {unit: [run.at(step, unit) for step in marks] for unit in ("MB", "objects")}


def test_a_leak_in_a_run_is_found(tmp_path):
    marks = (10, 20, 30)
    found = alone(leaking, tmp_path, marks)
    for unit, a_step in {"MB": 4.0, "objects": 100.0}.items():
        grown = dict(zip(marks, found[unit], strict=True))
        assert grown[30] / 20 == pytest.approx(a_step, rel=0.3)
        line = _line(grown.__getitem__, 0, a_step, marks[1:])
        assert line.is_too_fast


@pytest.mark.parametrize("part", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in TINY])
def test_each_part_runs(part, tmp_path, monkeypatch):
    monkeypatch.setitem(growth.PARTS, part, (TINY[part], growth.PARTS[part][1]))
    for module in ("length.ROWS", "shards.LISTED"):
        monkeypatch.setattr(f"benchmarks.growth.{module}", (10, 20))
    growth.main([f"--out={tmp_path / 'growth.json'}", "--parts", part])
    found = json.loads((tmp_path / "growth.json").read_text())[part]
    assert len(found) >= 8
    for row in found:
        assert len(row["points"]) >= 2 and row["expected"] in (0, 1) and math.isfinite(row["exponent"])
