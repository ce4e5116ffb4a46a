"""The precision of a run: selected by the processor, reported, recorded and used everywhere."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from comparing import error_of
from one_after_another import fit_all
from tiny_runs import ROOT, Chain
from watched import NoHalf

from ldm import encode, fit, sample, training
from ldm.hardware import choose_precision

HIDDEN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
AUTO = choose_precision(torch.device("cpu"))
FEW = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]


def test_auto_is_resolved_reported_and_recorded(fresh, capsys):
    assert fit.main(fresh.arguments("autoencoder", *FEW, "--trainer.precision=auto")) == 0
    output, native = capsys.readouterr(), AUTO == "bf16-mixed"
    assert f"{AUTO} (auto: bfloat16 is {'native' if native else 'not native'} on this cpu)" in output.out
    assert "warning" not in output.err
    run = fresh.runs / "autoencoder"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"] == AUTO
    here = json.loads((run / "environment.json").read_text())
    assert here["bfloat16"] == (["cpu"] if native else [])
    assert here["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_every_configuration_leaves_the_precision_to_the_processor():
    found = [path for path in (ROOT / "configs").rglob("*.yaml") if "precision:" in path.read_text()]
    assert [path.name for path in found] == ["base.yaml"]
    assert yaml.safe_load(found[0].read_text())["trainer"]["precision"] == "auto"


@pytest.mark.slow
def test_without_bfloat16_auto_trains_in_float32_and_bf16_mixed_warns_once(fresh, home, tmp_path):
    left = fresh.arguments("autoencoder", *FEW, "--trainer.precision=auto")
    arguments = fresh.arguments("autoencoder", "--trainer.max_steps=3", "--trainer.precision=bf16-mixed")
    plan = [{"arguments": left}, {"arguments": arguments}]
    done = fit_all(plan, tmp_path / "plan.json", home, **HIDDEN)
    assert "32-true (auto: bfloat16 is not native on this cpu)" in done.stdout
    assert done.stdout.count("bf16-mixed") == 1
    assert done.stderr.count("only emulates bfloat16: matrix products take") == 1


@pytest.mark.parametrize(
    "stage",
    [
        "autoencoder",
        pytest.param("clip", marks=pytest.mark.slow),
        pytest.param("diffusion", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_float32_computes_no_product_in_half_precision(fresh, stage):
    with NoHalf() as watch:
        assert fit.main(fresh.arguments(stage, *FEW, "--trainer.precision=32-true")) == 0
    assert watch.count > 100


def test_commands_compute_no_product_in_half_precision(chain, tmp_path):
    elsewhere = Chain(chain.runs, chain.shards, tmp_path / "latents")
    drawing = [
        f"--checkpoint={chain.runs / 'diffusion'}",
        "--prompt=a red ring",
        f"--out={tmp_path / 'drawn'}",
    ]
    with NoHalf() as watch:
        assert encode.main(elsewhere.encode()) == 0
        assert sample.main(drawing) == 0
    assert watch.count > 100


@pytest.mark.skipif(AUTO == "32-true", reason="this processor computes no bfloat16")
def test_a_run_in_bfloat16_does_and_its_muon_too(fresh):
    with pytest.raises(AssertionError, match=r"in torch\.bfloat16"), NoHalf():
        fit.main(fresh.arguments("autoencoder", *FEW, "--trainer.precision=bf16-mixed"))
    stage = training.build(fresh.arguments("autoencoder", "--trainer.precision=bf16-mixed"))
    stage.trainer.strategy.connect(stage.model)
    stage.model.trainer = stage.trainer
    assert stage.model.configure_optimizers()["optimizer"].dtype == torch.bfloat16


def test_float16_on_a_cpu_is_refused(fresh, capsys):
    assert fit.main(fresh.arguments("autoencoder", "--trainer.precision=16-mixed")) == 2
    output = "error: trainer.precision: got 16-mixed, which is for GPUs; expected auto on a CPU"
    assert output in capsys.readouterr().err
    assert fit.main(fresh.arguments("autoencoder", "--trainer.precision=32")) == 2
    assert "trainer.precision: got 32, expected" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_of_different_precision_are_refused(fresh):
    """One node of two may lack bfloat16; here the command lines differ."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", *FEW]
    code = (
        "import os, sys; from ldm import fit;"
        "rank = os.environ.get('LOCAL_RANK', '0');"
        "sys.exit(fit.main([*sys.argv[1:], '--trainer.precision=' + ['32-true', 'bf16-mixed'][int(rank)]]))"
    )
    script = fresh.runs.parent / "differs.py"
    script.write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *fresh.arguments("autoencoder", *two)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode != 0
    assert "trainer.precision: 32-true on process 0, but bf16-mixed on process 1" in done.stderr
    assert not (fresh.runs / "autoencoder" / "checkpoints").exists()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused(fresh, capsys, precision):
    line = error_of(capsys, fresh.arguments("clip", f"--trainer.precision={precision}"))
    assert f"trainer.precision: got {precision}, expected {precision[:-5]}-mixed: weights" in line
