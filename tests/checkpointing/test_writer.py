"""A checkpoint file is the old one or the new one, never a part."""

import contextlib
import itertools
import os
import resource
from contextlib import contextmanager

import pytest
import torch

from ldm.checkpointing.writer import AtomicCheckpointIO, newest_complete
from ldm.io.atomic import link
from ldm.io.checkpoint import Checkpoint, header, verify


def test_written_files_are_read_back_and_no_others_are_left(tmp_path):
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


def test_the_target_is_untouched_until_the_new_file_is_complete(tmp_path):
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


def test_whoever_reads_a_checkpoint_checks_it(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(
        {**header(), "stage": "x", "config": {}, "w": torch.rand(1000)}, path
    )
    assert Checkpoint.open(path).stage == "x"
    altered = bytearray(path.read_bytes())
    altered[len(altered) // 2] ^= 1
    path.write_bytes(altered)
    with pytest.raises(ValueError, match=r"a.ckpt' cannot be read: the checksum of its part '.*' is wrong"):
        Checkpoint.open(path)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    for name in ("a.ckpt.tmp-999999", "best.ckpt.tmp-999998", "notes.tmp-1"):
        (tmp_path / name).write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "notes.tmp-1"]


@contextmanager
def disk_of(num_bytes):
    """A file cannot grow beyond this: the closest to a full disk that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_keeps_the_earlier_files(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    for step in (1, 2):
        io.save_checkpoint({"step": step}, path)
    with (
        disk_of(50_000),
        pytest.raises(OSError, match=r"last.ckpt' cannot be written: \[Errno 27\] File too large"),
    ):
        io.save_checkpoint({"step": 3, "weight": torch.zeros(100_000)}, path)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]
    assert io.load_checkpoint(path) == {"step": 2}
    assert io.load_checkpoint(tmp_path / "previous.ckpt") == {"step": 1}


def test_an_object_that_cannot_be_pickled_is_no_full_disk(tmp_path):
    class Breaks:
        def __reduce__(self):
            raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError):
        AtomicCheckpointIO().save_checkpoint({"x": Breaks()}, tmp_path / "a.ckpt")


def altered(path):
    """Flip one bit in the middle of the weights."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # previous.ckpt may be the same file
    path.write_bytes(data)


def cut(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


def emptied(path):
    path.unlink()
    path.touch()


@pytest.fixture
def folder(tmp_path):
    """last.ckpt of step 3, previous.ckpt of step 2, and a kept one of step 1."""
    for step in (1, 2, 3):
        weight = torch.full((10_000,), 1.5)
        AtomicCheckpointIO().save_checkpoint({"step": step, "weight": weight}, tmp_path / "last.ckpt")
        if step == 1:
            link(tmp_path / "last.ckpt", tmp_path / "step=00000001.ckpt")
    return tmp_path


@pytest.mark.parametrize("damage", [altered, cut, emptied])
def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(folder, damage, capsys):
    io = AtomicCheckpointIO()
    for name, before, step in (("last", "previous", 2), ("previous", "step=00000001", 1)):
        damage(folder / f"{name}.ckpt")
        with pytest.raises(ValueError, match=f"{name}.ckpt' cannot be read"):
            io.load_checkpoint(folder / f"{name}.ckpt")
        taken = newest_complete(folder)
        assert taken == folder / f"{before}.ckpt" and io.load_checkpoint(taken)["step"] == step
        assert f"{name}.ckpt' cannot be read" in capsys.readouterr().err
    damage(folder / "step=00000001.ckpt")
    with pytest.raises(
        ValueError, match=r"last.ckpt' cannot.*previous.ckpt' cannot.*step=00000001.ckpt' cannot"
    ):
        newest_complete(folder)


def test_one_altered_bit_passes_torch_unnoticed_but_not_us(folder):
    altered(folder / "last.ckpt")
    assert not torch.load(folder / "last.ckpt", weights_only=True)["weight"].eq(1.5).all()
    with pytest.raises(ValueError, match=r"checksum of its part '.*data/0' is wrong"):
        verify(folder / "last.ckpt")


def test_undamaged_the_newest_is_taken_in_silence(folder, capsys):
    assert newest_complete(folder) == folder / "last.ckpt"
    assert capsys.readouterr().err == ""
    assert newest_complete(folder / "none") is None


def test_a_kill_at_any_moment_of_a_save_leaves_a_complete_newest_checkpoint(folder, monkeypatch):
    """Each step of a save that changes the folder is the last one in turn."""
    operations = ("link", "replace", "unlink", "fsync", "open")
    for death in range(20):
        calls = itertools.count()

        def dies(real, calls=calls, death=death):
            def operation(*args, **kwargs):
                if next(calls) >= death:
                    raise SystemExit("killed")
                return real(*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for name in operations:
                patch.setattr(os, name, dies(getattr(os, name)))
            with contextlib.suppress(SystemExit):
                AtomicCheckpointIO().save_checkpoint({"step": 4 + death}, folder / "last.ckpt")
        assert newest_complete(folder) == folder / "last.ckpt"
        assert AtomicCheckpointIO().load_checkpoint(folder / "previous.ckpt")["step"] >= 2
    assert next(calls) < death, "the last saves ended before their turn to die"


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
