"""The saved view of W&B: the panels of the docs, by the real package, sent to the stand-in for the server."""

import json
import re
import sys
from pathlib import Path

import pytest
from wandb_server import Server

from ldm.loggers import workspace

PAGE = (Path(__file__).parents[2] / "docs" / "comparing-runs.md").read_text()


def test_the_docs_say_of_each_panel_what_it_compares():
    table = PAGE.split("### A workspace for one stage")[1].split("| panel |")[1].split("\n\n")[0]
    firsts = [line.split("|")[1] for line in table.splitlines()[2:]]
    names = {name for first in firsts for name in re.findall(r"`([^`]+)`", first)}
    assert names == {*workspace.IMAGES, *(name for names in workspace.CURVES.values() for name in names)}


@pytest.mark.slow
def test_the_view_has_a_panel_for_each_name_over_samples(monkeypatch, tmp_path, capsys):
    pytest.importorskip("wandb_workspaces")
    with Server() as server:
        for name, value in {**server.environment, "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        assert workspace.main(["--project=mine"]) == 0
        (view,) = server.views
        server.refusals = {"UpsertView2": "project not found"}
        assert workspace.main(["--project=gone", "--entity=nobody"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("ldm: 24 panels, http://127.0.0.1") and len(out.splitlines()) == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "--project 'gone': no view was saved" in line and "project not found" in line
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "mine", "ldm")
    section = json.loads(view["spec"])["section"]
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    assert len(panels) == 24 and section["settings"]["xAxis"] == "samples"
    curves = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert {curve["xAxis"] for curve in curves} == {"samples"} and len(curves) == 22
    shown = [
        re.compile(
            f"^{curve['metricRegex']}" if "metricRegex" in curve else f"^{re.escape(curve['metrics'][0])}$"
        )
        for curve in curves
    ]
    for name in (
        "val/loss",
        "val/loss_quarter_3",
        "val/fid/clip",
        "val/image_to_text@10/clip",
        "val/latent_std_max",
    ):
        assert sum(bool(pattern.search(name)) for pattern in shown) == 1, name


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert workspace.main([]) == 2
    assert "needs wandb-workspaces: pip install 'ldm[workspace]'" in capsys.readouterr().err
