"""Packages that wait to be executed until something needs them, and that a start needs none of them."""

import importlib
import importlib.resources
import json
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest

from ldm import deferred

INIT = """
import ready
ready.executed += 1
if ready.executed == 1:
    raise RuntimeError("not yet")
import time
time.sleep(ready.pause)
import toy
assert not hasattr(toy, "late")
from toy.part import given
late = [given]
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package that waits; ``ready.executed`` counts how often it was executed, the first time in vain."""
    (tmp_path / "ready.py").write_text("executed = 0\npause = 0.0")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text(INIT)
    (tmp_path / "toy" / "part.py").write_text("from toy import given")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(deferred.DEFERRED, "toy", lambda package: vars(package).update(given="given"))
    yield import_module("toy")
    for name in ("ready", "toy", "toy.part"):
        sys.modules.pop(name, None)


def executed():
    return import_module("ready").executed


def test_names_that_it_was_given_and_its_modules_need_no_execution(toy):
    assert toy.given == "given"
    assert import_module("toy.part").given == "given" and toy.part is sys.modules["toy.part"]
    assert executed() == 0
    assert sys.modules["toy"] is toy and toy.__spec__.name == "toy"


def test_any_other_name_executes_it_once_and_a_failure_leaves_it_waiting(toy):
    with pytest.raises(RuntimeError, match="not yet"):
        toy.late  # noqa: B018
    assert toy.late == ["given"] and toy.late is toy.late
    assert executed() == 2 and type(toy) is type(sys)
    with pytest.raises(AttributeError, match="module 'toy' has no attribute 'other'"):
        toy.other  # noqa: B018


def test_a_list_of_its_names_has_all(toy):
    with pytest.raises(RuntimeError, match="not yet"):
        dir(toy)
    assert {"given", "late"} <= set(dir(toy))


def test_threads_wait_for_each_other(toy):
    with pytest.raises(RuntimeError, match="not yet"):
        toy.late  # noqa: B018
    import_module("ready").pause = 0.05
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: toy.late, range(6)))
    assert found == [["given"]] * 6
    assert executed() == 2


def test_its_files_are_read_as_those_of_any_package(toy):
    assert {"__init__.py", "part.py"} <= {path.name for path in importlib.resources.files("toy").iterdir()}
    assert pkgutil.get_data("toy", "part.py") == b"from toy import given"
    assert executed() == 0


def test_a_reload_of_the_module_that_defers_changes_nothing(toy):
    finders = list(sys.meta_path)
    importlib.reload(deferred).defer()
    assert sys.meta_path == finders
    with pytest.raises(RuntimeError, match="not yet"):
        toy.late  # noqa: B018
    assert toy.late == ["given"]


def test_a_package_that_is_not_there_is_not_found(monkeypatch):
    monkeypatch.setitem(deferred.DEFERRED, "there_is_no_such_package", None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'there_is_no_such_package'"):
        import_module("there_is_no_such_package")


STARTS = """
import json, sys
from ldm import ROOMS, import_exports, training

import_exports(ROOMS)
heavy = "matplotlib open_clip scipy timm torch_fidelity torchmetrics.image torchvision transformers wandb"
there = sorted(set(heavy.split()) & set(sys.modules))

import lightning.pytorch.core.module as core
import torch
import torchmetrics

kinds = [type(torchmetrics).__name__]
metric = torchmetrics.classification.BinaryAccuracy()
kinds.append(type(torchmetrics).__name__)
metric.update(torch.tensor([0.2, 0.8]), torch.tensor([0, 1]))
figure, _ = metric.plot()
is_same = torchmetrics.Metric is core.Metric and torchmetrics.MetricCollection is core.MetricCollection
print(json.dumps([there, kinds, is_same and isinstance(metric, core.Metric), type(figure).__name__]))
"""


@pytest.mark.slow
def test_training_starts_without_what_it_may_not_need():
    command = [sys.executable, "-c", STARTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    there, kinds, is_same, figure = json.loads(done.stdout)
    assert there == []
    assert kinds == ["Deferred", "module"]
    assert is_same and figure == "Figure"
