"""Files of weights: nothing in them runs, nothing is lost, and damage is named."""

import collections
import json
import os
import re

import pytest
import torch

from ldm import __version__
from ldm.interop.files import new_folder, record
from ldm.io.checkpoint import Checkpoint, header
from ldm.io.json_file import read_json, write_json
from ldm.io.weights import read_metadata, read_weights, sha256, write_weights

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "c": torch.ones(2).half()}


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_written_weights_are_read_back_bit_for_bit(tmp_path):
    transposed = WEIGHTS | {
        "d": torch.rand(4, 3).T,
        "e": torch.rand(1, 2, 3, 3).to(memory_format=torch.channels_last),
    }
    write_weights(tmp_path / "sub" / "x.safetensors", transposed, {"by": "a test"})
    same(read_weights(tmp_path / "sub" / "x.safetensors"), transposed)
    assert os.listdir(tmp_path / "sub") == ["x.safetensors"], "no temporary file is left"


@pytest.mark.parametrize("wrap", [dict, lambda w: {"state_dict": w, "epoch": 3, "lr": [0.1]}])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_any_age_are_read(tmp_path, wrap, zipped):
    torch.save(wrap(WEIGHTS), tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    same(read_weights(tmp_path / "x.ckpt"), WEIGHTS)


class Callback:
    """A callback in old checkpoints of Lightning: the class as a key, and objects with state."""

    def __init__(self):
        self.best, self.paths = torch.tensor(0.5), ["x"]


class AttributeDict(dict):
    """A dict of a foreign class."""


def test_foreign_objects_in_a_checkpoint_are_harmless(tmp_path):
    settings = collections.defaultdict(list, {"a": [1]})
    foreign = {"callbacks": {Callback: Callback()}, "hyper": AttributeDict(lr=0.1), "settings": settings}
    torch.save({"state_dict": WEIGHTS, **foreign}, tmp_path / "x.ckpt")
    same(read_weights(tmp_path / "x.ckpt"), WEIGHTS)


class Attack:
    """Unpickled as usual, it runs a function of any module."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(tmp_path):
    command = f"touch {tmp_path / 'ran'}"
    write = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    return [Attack(os.system, command), Attack(exec, write), Attack(eval, write.replace(".close()", ""))]


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cannot_run_anything(tmp_path, kind, zipped):
    attack, path = attacks(tmp_path)[kind], tmp_path / "x.ckpt"
    torch.save({"state_dict": WEIGHTS, "x": attack}, path, _use_new_zipfile_serialization=zipped)
    try:
        same(read_weights(path), WEIGHTS)
    except ValueError as error:
        assert f"weights '{path}' cannot be read: " in str(error) and "\n" not in str(error)
    assert not (tmp_path / "ran").exists()
    torch.save(WEIGHTS | {"x": attack}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"x\.ckpt'"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the file is a real attack: read without care it runs"


def damaged(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02 this is no file of weights")
    return tmp_path / name


def test_other_files_than_weights_are_named(tmp_path):
    for name in ("x.safetensors", "x.ckpt"):
        with pytest.raises(ValueError, match=rf"weights '.*{name}' cannot be read: .") as error:
            read_weights(damaged(tmp_path, name))
        assert "weights_only" not in str(error.value)  # torch's advice to switch its safety off


def test_files_are_recognised_by_what_is_in_them_and_not_by_their_names(tmp_path):
    write_weights(tmp_path / "x.ckpt", WEIGHTS, {"by": "a test"})
    same(read_weights(tmp_path / "x.ckpt"), WEIGHTS)
    assert read_metadata(tmp_path / "x.ckpt")["by"] == "a test"
    for zipped in (True, False):
        torch.save(WEIGHTS, tmp_path / "y.safetensors", _use_new_zipfile_serialization=zipped)
        same(read_weights(tmp_path / "y.safetensors"), WEIGHTS)
        assert read_metadata(tmp_path / "y.safetensors") == {}


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "a Git LFS pointer, not the file itself: run 'git lfs pull'"),
        ("\n<!DOCTYPE html>\n<html></html>", "a web page, not the file itself"),
        ("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page, not the file itself"),
        ("", "cannot be read: the file is empty"),
    ],
)
def test_pointers_and_pages_instead_of_weights_are_named(tmp_path, content, message):
    readers = {"x.safetensors": read_weights, "x.ckpt": read_weights, "x.pth": read_weights}
    readers |= {"x.json": read_json, "y.safetensors": read_metadata, "last.ckpt": Checkpoint.open}
    for name, read in readers.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    "found",
    [
        {**WEIGHTS, "epoch": 3, "global_step": 7, "name": "x", "lr": [0.1], "betas": (0.9, 0.99)},
        {"state_dict": {**WEIGHTS, "step": 3}},
        {"model": WEIGHTS, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "groups": []}, "epoch": 3},
    ],
)
def test_numbers_and_strings_among_tensors_are_left_out(tmp_path, found):
    torch.save(found, tmp_path / "x.ckpt")
    same(read_weights(tmp_path / "x.ckpt"), WEIGHTS)


def test_of_two_models_in_a_file_none_is_guessed(tmp_path):
    torch.save({"model": WEIGHTS, "ema": WEIGHTS}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt' hold 'model', 'ema', expected tensors by name, or one"):
        read_weights(tmp_path / "x.ckpt")


def test_an_export_is_atomic_and_overwrites_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        assert not list(out.iterdir())
    assert [path.name for path in out.iterdir()] == ["config.json"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"out' is there already"), new_folder(out):
        pass
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt' do not exist"):
        read_weights("nowhere.ckpt")
    with pytest.raises(FileNotFoundError, match=r"out' are a folder, expected a local file"):
        read_weights(out)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt' hold a list, expected tensors by name"):
        read_weights(tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match=r"step\.pt' hold 'step', expected tensors by name"):
        read_weights(tmp_path / "step.pt")
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"program\.pt' are a TorchScript archive"):
        read_weights(tmp_path / "program.pt")


def test_json(tmp_path):
    write_json(tmp_path / "sub" / "x.json", {"ü": [1.5, None]})
    assert read_json(tmp_path / "sub" / "x.json") == {"ü": [1.5, None]}
    (tmp_path / "y.json").write_text("{'a': 1}")
    with pytest.raises(ValueError, match=r"y\.json' is not JSON"):
        read_json(tmp_path / "y.json")
    (tmp_path / "y.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"y\.json' holds a list, expected a JSON object"):
        read_json(tmp_path / "y.json")
    with pytest.raises(FileNotFoundError, match=r"z\.json' does not exist"):
        read_json(tmp_path / "z.json")


def test_a_record_names_the_source_of_an_export(tmp_path):
    path = tmp_path / "x.ckpt"
    state = {"stage": "clip", "config": {"class_path": "a.B"}, "weights": "ema"}
    progress = {"progress": {"steps": 1, "samples": 7}}
    torch.save({**header(), **progress, **state}, path)
    found = record(Checkpoint.open(path))
    assert found.pop("software") == f"ldm {__version__}" and found.pop("sha256") == sha256(path)
    assert found.pop("samples_seen") == 7
    assert found == {**state, "source": str(path), "image_size": None, "upstream": {}}
    torch.save({**header(), **progress, "stage": "clip", "config": {}}, path)
    assert record(Checkpoint.open(path))["weights"] == "raw"
