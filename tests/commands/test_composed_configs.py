"""Composed configurations, and their output of --print_config."""

import pytest
import yaml
from tiny_runs import ROOT

from ldm import fit, training


def written(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{next(iter(files))}.yaml"


def test_callbacks_are_added_and_single_fields_changed(chain, fresh, tmp_path):
    below = {
        "trainer": {"callbacks+": ["Compile"], "log_every_n_steps": 7},
        "model": {
            "class_path": "Autoencoder",
            "init_args": {"net": {"latent_channels": 2}, "kl_weight": 0.5},
        },
    }
    above = {
        "base": ["b.yaml", str(ROOT / "configs" / "demo" / "autoencoder.yaml"), "c.yaml"],
        "model": {"init_args": {"kl_weight": 0.25}},
    }
    path = written(tmp_path, a=above, b=below, c={"trainer": {"callbacks+": ["ActivationCheckpointing"]}})
    arguments = fresh.arguments("autoencoder")
    cli = training.build(["--config", str(path), *arguments[2:]])
    assert cli.config.model.init_args.kl_weight == 0.25 and cli.model.net.latent_channels == 4
    assert cli.config.trainer.log_every_n_steps == 1  # the command line comes last
    found = [callback.class_path.rpartition(".")[2] for callback in cli.config.trainer.callbacks]
    assert found[-2:] == ["Compile", "ActivationCheckpointing"] and "SkipNonFinite" in found


def test_the_output_of_print_config_runs_unchanged(chain, fresh, tmp_path, capsys):
    arguments = fresh.arguments("autoencoder")
    with pytest.raises(SystemExit):
        training.build([*arguments, "--print_config"])
    (tmp_path / "mine.yaml").write_text(text := capsys.readouterr().out)
    with pytest.raises(SystemExit):
        training.build(["--config", str(tmp_path / "mine.yaml"), "--print_config"])
    assert capsys.readouterr().out == text
    assert fit.main(["--config", str(tmp_path / "mine.yaml"), "--trainer.max_steps=4"]) == 0
