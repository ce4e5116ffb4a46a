"""A checkpoint is opened once, states which version wrote it, and that of another version is refused."""

import hashlib

import pytest
import torch
from torch import nn

from ldm import __version__
from ldm.io import checkpoint as module
from ldm.io.checkpoint import FORMAT, Checkpoint, header, instantiate

STATE = {"stage": "x", "config": {"class_path": "a.B"}, "weight": torch.arange(1000.0)}


@pytest.fixture
def path(tmp_path):
    torch.save({**header(), **STATE}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_state_and_hash_are_of_the_file_that_was_opened_whatever_replaces_it(path):
    content = path.read_bytes()
    checkpoint = Checkpoint.open(path)
    torch.save({**header(), **STATE, "weight": torch.zeros(1000)}, path.with_name("b.ckpt"))
    path.with_name("b.ckpt").replace(path)
    assert torch.equal(checkpoint.state["weight"], STATE["weight"])
    assert checkpoint.sha256 == hashlib.sha256(content).hexdigest() != Checkpoint.open(path).sha256


def test_the_file_is_hashed_and_verified_once_per_process(path, monkeypatch):
    first = Checkpoint.open(path)
    digest = first.sha256

    def fails(*args):
        raise AssertionError("read again")

    monkeypatch.setattr(module.hashlib, "sha256", fails)
    monkeypatch.setattr(module.zipfile, "ZipFile", fails)
    assert Checkpoint.open(path).sha256 == digest


def test_writing_to_a_tensor_does_not_write_to_the_file(path):
    Checkpoint.open(path).state["weight"].zero_()
    assert torch.equal(torch.load(path)["weight"], STATE["weight"])


def test_a_checkpoint_states_the_version_that_wrote_it(path):
    state = Checkpoint.open(path).state
    assert (state["ldm_version"], state["format"]) == (__version__, FORMAT)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({}, r"a.ckpt' was written by ldm 0.1, which ldm .* cannot read: train it again, or export it with"),
        ({"ldm_version": "9.0", "format": 7}, r"a.ckpt' has format 7 of ldm 9.0, expected format 2 of ldm"),
    ],
)
def test_another_version_is_one_clear_line(tmp_path, head, message):
    torch.save({**head, **STATE}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        Checkpoint.open(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value)


def test_a_run_folder_stands_for_its_newest_checkpoint(path):
    last = path.parent / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    path.rename(last)
    assert Checkpoint.open(path.parent / "run").file == last


def test_an_object_is_built_from_plain_values_and_of_the_expected_class_only():
    config = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    built, complete = instantiate(config, nn.Linear)
    assert built.weight.shape == (3, 2) and complete["init_args"]["bias"] is True
    with pytest.raises(ValueError, match=r"names the class torch\.nn\.Linear, expected a Conv2d"):
        instantiate(config, nn.Conv2d)
