"""Every configuration parses, instantiates and keeps to the rules of the house."""

import pytest
import yaml
from tiny_runs import ROOT

from ldm import fit


def name(path):
    return str(path.relative_to(ROOT / "configs"))


def marks(path):
    """Networks of full size take their time to be made."""
    return () if path.parent.name in ("demo", "conditions") else pytest.mark.slow


CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.name != "base.yaml")


@pytest.mark.parametrize("path", [pytest.param(path, marks=marks(path)) for path in CONFIGS], ids=name)
def test_a_configuration_instantiates(tmp_path, path, chain):
    text = path.read_text()
    config = yaml.safe_load(text)
    quick = [f"--run={tmp_path}", "--wandb.mode=disabled", "--trainer.accelerator=cpu"]
    if path.parent.name not in ("demo", "conditions") and "latents" in config["model"]["init_args"]:
        # its upstream runs take days: tiny ones stand in, and its own widths follow theirs
        quick.append(f"--model.latents.checkpoint={chain.runs / 'autoencoder'}")
        quick.append(f"--model.conditioner.checkpoint={chain.runs / 'clip'}")
    cli = fit.build(["--config", str(path), *quick])
    assert cli.model.config["class_path"] == config["model"]["class_path"]
    assert config["trainer"]["max_steps"] % config["trainer"]["val_check_interval"] == 0


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_configuration_is_short_and_opens_with_its_command(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert f"python -m ldm.fit --config {path.relative_to(ROOT)}" in head
    assert "xpected" in head


def test_misspelt_fields_cannot_hide_behind_base_yaml(tmp_path):
    assert fit.main(["--config", str(CONFIGS[0]), f"--run={tmp_path}", "--trainer.log_every_n_step=1"]) == 2
