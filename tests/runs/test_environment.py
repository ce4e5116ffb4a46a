"""The record of a working tree with uncommitted changes."""

import subprocess

import pytest

from ldm.runs import environment


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one revision, whose package folder environment believes to lie in."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("one\ntwo\n\n")
    (tmp_path / "above.txt").write_text("above\n")
    (tmp_path / ".gitignore").write_text("ignored\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    return tmp_path


def test_a_clean_tree_has_no_changes(repository):
    (repository / "ignored").write_text("x")
    assert environment.uncommitted() == ""
    assert environment.environment()["git"]["dirty"] is False


def test_the_changes_of_the_repository_can_be_applied_again(repository, tmp_path_factory):
    (repository / "package" / "a.py").write_text("one\nthree\n\n")
    (repository / "above.txt").write_text("below\n")
    git(repository, "add", "above.txt")  # staged or not
    (repository / "new.py").write_text("")
    changes = environment.uncommitted()
    assert environment.environment()["git"]["dirty"] is True
    assert changes.startswith("# not under version control: new.py\n")
    git(repository, "stash", "-q")
    patch = tmp_path_factory.mktemp("patch") / "uncommitted.diff"
    patch.write_text(changes)
    git(repository, "apply", str(patch))
    assert (repository / "package" / "a.py").read_text() == "one\nthree\n\n"
    assert (repository / "above.txt").read_text() == "below\n"


def test_a_long_diff_is_cut_with_a_note(repository):
    (repository / "above.txt").write_text("ä" * environment.MOST_CHANGES)
    changes = environment.uncommitted()
    assert environment.MOST_CHANGES <= len(changes.encode()) < environment.MOST_CHANGES + 100
    assert changes.endswith(" bytes in all\n") and "# cut: 2,09" in changes


def test_outside_of_a_repository_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.uncommitted() == "" and environment.environment()["git"] is None
