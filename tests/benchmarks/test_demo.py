"""The demo in miniature, and its figures."""

import json

import pytest
import torch

from benchmarks.demo.forecast import announcement, forecast
from benchmarks.demo.report import TABLE, Line, Times, table

measure = pytest.importorskip("benchmarks.demo.measure")


@pytest.mark.slow
def test_the_full_chain_in_miniature(tmp_path, capfd, monkeypatch):
    from benchmarks.demo.__main__ import main
    from benchmarks.demo.steps import tiny, train

    threads = torch.get_num_threads()
    assert main(["--tiny", "--folder", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "runs/demo/report.json").read_text())
    assert {line.figure for line in TABLE} <= report["figures"].keys()
    assert (tmp_path / "runs/demo/samples.png").is_file()
    shown = capfd.readouterr().out
    assert "[autoencoder] " in shown
    assert "[clip] " in shown
    monkeypatch.chdir(tmp_path)
    assert train(tiny(), "clip") == {}, "a finished stage is not trained again"
    assert "finished, 4 of 4 steps are done" in (tmp_path / "runs/demo/clip/log.txt").read_text()


@pytest.mark.slow
def test_the_forecast_adds_up_and_leaves_the_threads_as_they_were(monkeypatch):
    monkeypatch.setattr("benchmarks.demo.forecast.STEPS", 1)
    threads = torch.get_num_threads()
    seconds = forecast(1)
    assert torch.get_num_threads() == threads
    stages = {name: seconds[name] for name in ("autoencoder", "clip", "diffusion")}
    assert all(spent > 0 for spent in stages.values())
    # the rest is drawing, encoding, starting; on one core the first two share it
    assert seconds["total"] > sum(stages.values())
    text = announcement({"autoencoder": 60, "clip": 90, "diffusion": 600, "total": 3700})
    assert text.startswith("this machine needs about 1:01:40 from nothing, in ")
    assert "autoencoder 01:00, clip 01:30, diffusion 10:00" in text


def test_swapped_captions_mean_something_else_in_the_same_words():
    text = "a small orange square left of a large purple diamond on a white background"
    assert measure.swaps(text) == [
        "a small purple square left of a large orange diamond on a white background",
        "a large purple diamond left of a small orange square on a white background",
    ]
    same_colour = "a small red square above a large red ring on a black background"
    assert measure.swaps(same_colour) == ["a large red ring above a small red square on a black background"]
    assert measure.swaps("a large red ring in the center on a grey background") == []


def test_swap_accuracy_counts_strict_wins():
    class CLIPExtractor:
        """Features that tell left from right, but not colours."""

        def encode_text(self, text):
            return torch.tensor([[1.0, 0.0] if t.startswith("a small") else [0.0, 1.0] for t in text])

    text = "a small red square left of a large blue ring on a black background"
    image = torch.tensor([[1.0, 0.0]])
    assert measure.swap_accuracy(CLIPExtractor(), image, [text]) == 0.5


def test_times_add_up_over_calls_and_overlap_where_stages_do(tmp_path):
    times = Times(tmp_path / "times.json")
    times.add("autoencoder", 60)
    times.add("clip", 100)
    again = Times(tmp_path / "times.json")
    again.add("autoencoder", 60)
    again.set("measure", 5)
    figures = again.figures()
    assert figures["seconds/autoencoder"] == 120
    assert figures["seconds/total"] == 125


def test_a_line_reports_whether_its_goal_is_reached():
    line = Line("a", "share", goal=0.97)
    assert line.write({"a": 0.98}).split() == ["share", "0.980", ">=", "0.970", "reached"]
    assert line.write({"a": 0.96}).endswith("missed\n")
    assert line.write({}) == ""
    limit = Line("t", "time", goal=1200, at_most=True, form="clock")
    assert limit.write({"t": 1199}).split() == ["time", "19:59", "<=", "20:00", "reached"]
    assert table({"novel/all": 0.5}).splitlines()[-1].endswith("missed")
