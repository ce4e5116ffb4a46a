"""A record holds all that a number depends on, and in a resumed run nothing twice."""

import json

import torch

from ldm.diffusion.guidance import ClassifierFree, Interval
from ldm.diffusion.samplers.ddim import DDIM
from ldm.evaluation.record import append_lines, describe, describe_sampling


class Draws:
    def __init__(self):
        self.sampler = DDIM(25, eta=0.5)
        self.guidance = Interval(ClassifierFree(3.0), 0.2, 0.9)


def test_sampler_and_guidance_are_described_with_what_is_in_them():
    metadata = describe_sampling(Draws())
    assert metadata["steps"] == 25
    assert metadata["sampler"].startswith("DDIM(num_steps=25") and "eta=0.5" in metadata["sampler"]
    assert "ClassifierFree(scale=3.0)" in metadata["guidance"] and "0.2" in metadata["guidance"]
    assert describe_sampling(object()) == {}


def test_a_network_within_is_named_and_not_spelled_out():
    class Weak(ClassifierFree):
        def __init__(self):
            super().__init__(2.0)
            self.weak = torch.nn.Linear(2, 2)

    assert describe(Weak()) == "Weak(scale=2.0)"


def test_lines_of_the_same_time_or_later_are_replaced(tmp_path):
    path = tmp_path / "run" / "evaluations.jsonl"
    for samples, name in [(8, "a"), (16, "b"), (16, "c"), (24, "d"), (16, "e")]:
        append_lines(path, {"samples": samples, "evaluation": "all"}, [{"name": name}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["name"], line["samples"]) for line in lines] == [("a", 8), ("e", 16)]


def test_lines_of_another_evaluation_and_those_that_cannot_be_read_stay(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"cut sh\n[]\n')
    for name in ("often", "seldom", "often"):
        append_lines(path, {"samples": 8, "evaluation": name}, [{"name": name}])
    *damaged, one, two = path.read_text().splitlines()
    assert damaged == ['{"cut sh', "[]"]
    assert [json.loads(line)["name"] for line in (one, two)] == ["seldom", "often"]
