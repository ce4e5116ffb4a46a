"""A checkpoint file is the old one or the new one, never a part."""

import os

import pytest
import torch

from ldm.callbacks.checkpoint_io import AtomicCheckpointIO


def test_what_is_written_is_read_back_and_nothing_else_is_left(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "a.ckpt"
    state = {"weight": torch.arange(3), "step": 7, "names": ["a"]}
    io.save_checkpoint(state, path)
    loaded = io.load_checkpoint(path)
    assert torch.equal(loaded["weight"], state["weight"]) and loaded["step"] == 7 and loaded["names"] == ["a"]
    assert os.listdir(path.parent) == ["a.ckpt"]


class BreaksOff:
    def __reduce__(self):
        raise OSError("no space left on device")


def test_an_error_while_writing_keeps_the_earlier_file(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="no space left"):
        io.save_checkpoint({"weight": torch.zeros(1000), "bad": BreaksOff()}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_the_target_is_untouched_until_the_new_file_is_whole(tmp_path):
    path = tmp_path / "a.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    earlier = path.stat().st_ino
    seen = []

    class Looks:
        def __reduce__(self):
            seen.append((path.stat().st_ino, io.load_checkpoint(path)))
            return (int, ())

    io.save_checkpoint({"step": 2, "x": Looks()}, path)
    assert seen == [(earlier, {"step": 1})]
    assert path.stat().st_ino != earlier


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / "a.ckpt.tmp-999999").write_bytes(b"half")
    (tmp_path / "b.ckpt.tmp-999999").write_bytes(b"of another file")
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b.ckpt.tmp-999999"]


def test_bad_files_end_in_one_line(tmp_path):
    io = AtomicCheckpointIO()
    with pytest.raises(FileNotFoundError, match=r"checkpoint '.*none.ckpt' does not exist"):
        io.load_checkpoint(tmp_path / "none.ckpt")
    path = tmp_path / "cut.ckpt"
    io.save_checkpoint({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"checkpoint '.*cut.ckpt' cannot be read") as error:
        io.load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"x": Runs()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()
