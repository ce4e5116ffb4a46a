import os
import subprocess
import sys

import pytest

from ldm.io.atomic import MARK, replacing, sweep, unfinished, write_text


def test_the_new_content_replaces_the_file(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    write_text(path, "first")
    with replacing(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
        assert MARK in temporary.name
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["a.txt"]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the sec")
        raise RuntimeError
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_process_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first")
    program = f"""
import os, pathlib
from ldm.io.atomic import replacing
with replacing(pathlib.Path({str(path)!r})) as temporary:
    temporary.write_text("half of the sec")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert path.read_text() == "first"
    assert sum(MARK in name for name in os.listdir(tmp_path)) == 1
    of_others = [unfinished(path).name, f"b.txt{MARK}another-node-7", f"b.txt{MARK}"]
    for name in of_others:
        (tmp_path / name).touch()
    sweep(tmp_path, "b.txt")
    assert len(os.listdir(tmp_path)) == 5
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["a.txt", *of_others])


def test_a_second_name_of_the_same_content_leaves_no_third(tmp_path):
    """By POSIX, renaming one hard link of a file to another does nothing."""
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    write_text(path, "first")
    os.link(path, other)
    with replacing(other) as temporary:
        os.link(path, temporary)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]
    assert other.read_text() == "first"
