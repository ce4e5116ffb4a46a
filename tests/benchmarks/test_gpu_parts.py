"""The benchmark for a GPU, tried on a CPU with tiny networks: it must not fail where time is short."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import parts

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ours"), [("unet", True), ("autoencoder", False), ("clip", True)])
def test_a_network_is_trained_and_timed(name, ours, tmp_path):
    found = parts.training(name, ours, "eager", parts.Setting("tiny", CPU, tmp_path, rounds=1))
    assert 0 < found["share_of_peak"] < 1 and found["ms"] > 0
    assert found["samples_per_second"] == pytest.approx(1000 * found["batch"] / found["ms"])


def test_results_are_written_as_they_come(tmp_path, monkeypatch):
    seen = []

    def run(name, options, limit, work):
        seen.append(json.loads((tmp_path / "gpu.json").read_text()) if seen else {})
        return {"ms": 1.0} if name == "peak" else {"failed": "not done after 45 s"}

    monkeypatch.setattr(benchmark, "run", run)
    assert benchmark.main([f"--out={tmp_path / 'gpu.json'}", "--parts", "peak", "unet"]) == 0
    assert seen == [{}, {"peak": {"ms": 1.0}}]
    assert json.loads((tmp_path / "gpu.json").read_text())["unet"] == {"failed": "not done after 45 s"}


def test_a_part_that_takes_too_long_says_so(tmp_path):
    options = SimpleNamespace(size="tiny", device="cpu", rounds=1)
    assert benchmark.run("peak", options, 0.1, tmp_path) == {"failed": "not done after 0 s"}
