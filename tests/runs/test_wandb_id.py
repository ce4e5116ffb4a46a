"""A folder logs to a W&B run of its own: wherever it is moved, and a copy of it to another."""

import shutil

import pytest

from ldm.runs.folder import RunFolder


@pytest.fixture(autouse=True)
def no_id(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


def id_of(folder):
    return RunFolder(folder)._wandb_id()


def test_a_folder_keeps_its_run(folder):
    assert id_of(folder) == id_of(folder)
    assert (folder / "wandb-id.txt").read_text().split("\n")[0] == id_of(folder)


def test_a_copy_gets_a_run_of_its_own(folder, capsys):
    first, copy = id_of(folder), folder.with_name("b")
    shutil.copytree(folder, copy)
    assert id_of(copy) != first and id_of(folder) == first
    assert "is a copy of" in capsys.readouterr().out
    assert id_of(copy) == id_of(copy)


def test_a_folder_that_was_moved_keeps_its_run(folder):
    first, moved = id_of(folder), folder.with_name("b")
    folder.rename(moved)
    assert id_of(moved) == first
    shutil.copytree(moved, folder.with_name("elsewhere"))  # as mv does to another disk
    shutil.rmtree(moved)
    assert id_of(folder.with_name("elsewhere")) == first


def test_an_original_that_was_moved_after_it_was_copied_keeps_its_run(folder):
    first = id_of(folder)
    shutil.copytree(folder, folder.with_name("b"))
    other = id_of(folder.with_name("b"))
    folder.rename(folder.with_name("c"))
    assert (id_of(folder.with_name("c")), id_of(folder.with_name("b"))) == (first, other)


def test_an_id_without_its_folder_is_kept(folder):
    (folder / "wandb-id.txt").write_text("abcd1234\n")
    assert id_of(folder) == id_of(folder) == "abcd1234"


def test_the_environments_id_is_kept_and_another_is_refused(folder, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "sweep1")
    assert id_of(folder) == "sweep1"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert id_of(folder) == "sweep1"
    monkeypatch.setenv("WANDB_RUN_ID", "sweep2")
    with pytest.raises(ValueError, match=r"WANDB_RUN_ID is sweep2, but the run of '.*' is sweep1: unset it"):
        id_of(folder)


def test_a_run_stays_in_its_project(folder, tmp_path):
    run = RunFolder(folder)._wandb_id("mine")
    assert RunFolder(folder)._wandb_id("mine") == id_of(folder) == run
    with pytest.raises(
        ValueError, match=r"wandb\.project: got other, but the run of '.*' is in mine: name that"
    ):
        RunFolder(folder)._wandb_id("other")
    shutil.copytree(folder, folder.with_name("b"))
    assert RunFolder(folder.with_name("b"))._wandb_id("other") != run  # a copy is a run of its own
