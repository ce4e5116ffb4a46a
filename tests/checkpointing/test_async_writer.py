"""Checkpoints written in the background hold the state at the time of the call."""

import threading

import pytest
import torch

from ldm.checkpointing.async_writer import AsyncCheckpointIO, snapshot
from ldm.checkpointing.writer import AtomicCheckpointIO


class Slow(AsyncCheckpointIO):
    """Writes only once it may."""

    def __init__(self):
        super().__init__()
        self.may = threading.Event()

    def _write(self, checkpoint, target):
        assert self.may.wait(60)
        super()._write(checkpoint, target)


def test_a_checkpoint_holds_the_state_at_the_time_of_the_call(tmp_path):
    io, path, weight, names = Slow(), tmp_path / "a.ckpt", torch.zeros(3), ["a"]
    state = {"weight": weight, "names": names}
    kept = []
    io.save_checkpoint(state, path, lambda: kept.append(path.exists()))
    weight += 1  # training goes on
    names.append("b")
    assert not path.exists() and not kept
    io.may.set()
    io.finish()
    assert path.exists() and kept == [True]
    loaded = io.load_checkpoint(path)
    assert loaded["weight"].tolist() == [0, 0, 0] and loaded["names"] == ["a"]


def test_one_is_written_at_a_time_and_in_order(tmp_path):
    io, path = AsyncCheckpointIO(), tmp_path / "last.ckpt"
    for step in range(5):
        io.save_checkpoint({"step": step}, path)
    io.teardown()
    assert io.load_checkpoint(path)["step"] == 4
    assert io.load_checkpoint(tmp_path / "previous.ckpt")["step"] == 3


def test_an_error_is_met_by_who_comes_next_and_once(tmp_path):
    (tmp_path / "folder").write_text("a file where a folder should be")
    io = AsyncCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "folder" / "a.ckpt")
    with pytest.raises(OSError):
        io.save_checkpoint({"step": 2}, tmp_path / "a.ckpt")
    io.finish()
    io.save_checkpoint({"step": 3}, tmp_path / "a.ckpt")
    io.finish()
    assert io.load_checkpoint(tmp_path / "a.ckpt")["step"] == 3


def test_a_snapshot_keeps_aliases_and_shares_no_memory_with_training(tmp_path):
    weight = torch.rand(1000)
    state = {"a": weight, "b": [weight, (weight[:10], 3)], "c": None}
    copy = snapshot(state)
    assert copy["a"] is copy["b"][0]
    assert torch.equal(copy["b"][1][0], weight[:10]) and copy["b"][1][1] == 3 and copy["c"] is None
    assert copy["a"].data_ptr() != weight.data_ptr()
    assert type(copy) is dict and type(copy["b"][1]) is tuple


def test_the_same_bytes_are_written_as_without_a_thread(tmp_path):
    state = {"w": torch.rand(3, 4, 5, 5).to(memory_format=torch.channels_last), "half": torch.rand(7).half()}
    asynchronous, plain = AsyncCheckpointIO(), AtomicCheckpointIO()
    asynchronous.save_checkpoint(state, tmp_path / "one" / "a.ckpt")
    asynchronous.finish()
    plain.save_checkpoint(state, tmp_path / "two" / "a.ckpt")
    one, two = (plain.load_checkpoint(tmp_path / name / "a.ckpt") for name in ("one", "two"))
    for key, value in state.items():
        assert torch.equal(one[key], value) and one[key].stride() == two[key].stride() == value.stride()
