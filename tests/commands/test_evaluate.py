"""ldm.evaluate: checkpoints and images against shards, folders and ADM's files, by several processes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparing import error_of
from jsonargparse import Namespace
from PIL import Image
from tiny_runs import ROOT, SUPPORT
from tiny_shards import png, write_tar

from data.digits import WORDS, pack_digits
from ldm import evaluate, fit
from ldm.diffusion.guidance import Interval, Rescaled, Unguided
from ldm.diffusion.samplers.ddim import DDIM
from ldm.evaluation.plan import Sweep, TrainedStage, check_stages, load_trained, settings
from ldm.io.checkpoint import Checkpoint

PIXELS = """
- class_path: ldm.metrics.feature_metrics.FeatureMetrics
  init_args:
    extractor: {class_path: coarse.Coarse}
    measures: [{class_path: ldm.metrics.frechet.Frechet}, {class_path: ldm.metrics.kernel.KID}]
"""
THEIRS = """
- class_path: ldm.metrics.torch_metric.TorchMetric
  init_args:
    metric: {class_path: torchmetrics.image.StructuralSimilarityIndexMeasure, init_args: {data_range: 1.0}}
    name: their_ssim
    range: "[0,1]"
- class_path: ldm.metrics.ssim.SSIM
"""


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.yaml"
    path.write_text(PIXELS)
    return f"--metrics={path}"


def run(out, *arguments):
    assert evaluate.main([f"--out={out}", "--device=cpu", *map(str, arguments)]) == 0
    return json.loads((out / "evaluation.json").read_text())["results"]


def values(result):
    return {value["name"]: value["value"] for value in result["values"]}


def images(folder, count, size=32, seed=0):
    folder.mkdir(parents=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (count, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return pixels


@pytest.mark.slow
def test_a_sweep_draws_a_curve_and_records_every_number(chain, tmp_path, capsys):
    shards = chain.shards / "val-000000.tar"
    arguments = [f"--data={shards}", f"--clip={chain.runs / 'clip'}", "--num-images=8", "--steps", 2]
    results = run(
        tmp_path / "out", "--checkpoint", chain.runs / "diffusion", *arguments, "--guidance", 1, 3, 6
    )
    assert [result["drawn"]["guidance"] for result in results] == [
        "ClassifierFree(scale=1.0)",
        "ClassifierFree(scale=3.0)",
        "ClassifierFree(scale=6.0)",
    ]
    assert len({values(result)["fid/clip"] for result in results}) == 3
    assert all("clip_score/clip" in values(result) for result in results)
    drawn = results[0]["drawn"]
    assert drawn["checkpoint_sha256"] == Checkpoint.open(chain.runs / "diffusion").sha256
    assert (drawn["weights"], drawn["steps"], drawn["seed"]) == ("ema", 2, 0)
    first = results[0]["values"][0]
    assert (first["num"], first["num_real"]) == (8, 20) and len(first["weights_sha256"]) == 64
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    assert "|  | fid/clip | fid_floor/clip |" in capsys.readouterr().out


@pytest.mark.slow
def test_samplers_are_swept(chain, tmp_path, metrics):
    arguments = [f"--data={chain.shards / 'val-000000.tar'}", metrics, "--num-images=4", "--steps", 3, 4]
    arguments += ["--sampler=[DDIM, UniPC]", "--checkpoint", chain.runs / "diffusion"]
    results = run(tmp_path / "out", *arguments)
    assert [result["candidate"].partition(" ")[2] for result in results] == [
        f"sampler={name} steps={steps}" for name in ("DDIM", "UniPC") for steps in (3, 4)
    ]
    assert len({values(result)["fid/coarse"] for result in results}) == 4


def test_a_negative_prompt_takes_the_place_of_the_empty_caption(chain, tmp_path, metrics):
    shards = chain.shards / "val-000000.tar"
    arguments = ["--checkpoint", chain.runs / "diffusion", f"--data={shards}", metrics, "--num-images=4"]
    arguments += ["--steps", 2, "--guidance", 1, 5, "--save-images"]
    results, drawn = {}, {}
    for name, more in {"plain": [], "empty": [""], "ring": ["a large blue ring"]}.items():
        out = tmp_path / name
        results[name] = run(out, *arguments, *(f"--negative-prompt={each}" for each in more))
        paths = {path.name: np.load(path)["arr_0"].astype(int) for path in out.glob("*.npz")}
        drawn[name] = [images for _, images in sorted(paths.items())]
    assert [result["drawn"]["guidance"] for result in results["ring"]] == [
        "ClassifierFree(scale=1.0)",
        "NegativePrompt(prompt=a large blue ring, guidance=ClassifierFree(scale=5.0))",
    ]
    for scale, differs in ((0, False), (1, True)):
        plain, empty, ring = (drawn[name][scale] for name in ("plain", "empty", "ring"))
        assert np.abs(empty - plain).max() <= 1
        assert (np.abs(ring - plain).max() > 1) == differs


def test_copies_of_a_sample_are_other_images(chain, tmp_path, metrics):
    shards = chain.shards / "val-000000.tar"
    more = [f"--data={shards}", metrics, "--num-images=30", "--steps", 2, "--save-images"]
    run(tmp_path / "out", "--checkpoint", chain.runs / "diffusion", *more)
    (path,) = (tmp_path / "out").glob("*.npz")
    found = np.load(path)["arr_0"]
    assert found.shape == (30, 32, 32, 3) and found.dtype == np.uint8
    assert np.abs(found[0].astype(int) - found[20]).max() > 10


def test_a_folder_against_itself_a_folder_and_an_npz_file(tmp_path, metrics):
    mine = images(tmp_path / "mine", 40)
    real = images(tmp_path / "real", 30, seed=1)
    np.savez(tmp_path / "real.npz", arr_0=real)
    np.savez(tmp_path / "mine.npz", arr_0=mine)
    common = [metrics, "--images", tmp_path / "mine", tmp_path / "mine.npz"]
    folder = run(tmp_path / "a", *common, f"--reference={tmp_path / 'real'}")
    assert values(folder[0]) == values(folder[1]) and values(folder[0])["fid/coarse"] > 1e-4
    as_file = run(tmp_path / "c", *common, f"--reference={tmp_path / 'real.npz'}")
    assert values(as_file[0]) == values(folder[0])
    itself = run(tmp_path / "b", *common, f"--reference={tmp_path / 'mine'}")
    assert values(itself[0])["fid/coarse"] == pytest.approx(0.0, abs=1e-10)
    assert folder[0]["drawn"] == {"images": str(tmp_path / "mine"), "size": 32}


def test_a_later_call_keeps_the_results_of_the_one_before(tmp_path, metrics, capsys):
    images(tmp_path / "mine", 20)
    out = tmp_path / "out"
    found = [
        run(
            out,
            metrics,
            "--images",
            tmp_path / "mine",
            f"--reference={tmp_path / 'mine'}",
            f"--num-images={n}",
        )
        for n in (8, 9, 10)
    ]
    assert json.loads((out / "evaluation-1.json").read_text())["results"] == found[0]
    assert json.loads((out / "evaluation-2.json").read_text())["results"] == found[1]
    assert (
        f"{out / 'evaluation.json'} of an earlier call is now {out / 'evaluation-2.json'}"
        in capsys.readouterr().out
    )


def test_a_checkpoint_is_opened_once(chain, monkeypatch):
    opened = []
    mine = str(chain.runs / "autoencoder" / "checkpoints" / "last.ckpt")
    torch_load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a[0]) or torch_load(*a, **k))
    (trained,) = [load_trained(mine, torch.device("cpu"))]
    assert len(opened) == 1
    assert trained.origin["checkpoint_sha256"] == Checkpoint.open(mine).sha256


def test_files_and_checkpoints_in_one_call_get_the_metrics_that_suit_each(chain, tmp_path):
    images(tmp_path / "mine", 20)
    arguments = [f"--data={chain.shards / 'val-000000.tar'}", f"--clip={chain.runs / 'clip'}"]
    drawn = ["--checkpoint", chain.runs / "diffusion", "--num-images=8", "--steps", 2]
    of_stage, of_files = run(tmp_path / "a", *drawn, *arguments, "--images", tmp_path / "mine")
    assert values(of_stage).keys() - values(of_files).keys() == {"clip_score/clip"}
    assert "fid/clip" in values(of_files)
    assert any(name.startswith("truncated_captions@") for name in of_stage["drawn"])
    candidates = ["--checkpoint", chain.runs / "autoencoder", *arguments, "--images", tmp_path / "mine"]
    of_stage, of_files = run(tmp_path / "b", *candidates)
    assert {"psnr", "ssim"} <= values(of_stage).keys()
    assert not {"psnr", "ssim"} & values(of_files).keys()


def test_a_filter_chooses_among_the_samples_and_is_recorded(tmp_path, metrics):
    images(tmp_path / "mine", 20)
    rows = [files(n, png(7 * n, 32), {"score": n}) for n in range(12)]
    whole, kept = tmp_path / "whole" / "val-000000.tar", tmp_path / "kept" / "val-000000.tar"
    for path, chosen in ((whole, rows), (kept, rows[3:])):
        write_tar(path, [member for row in chosen for member in row])
    arguments = [metrics, "--images", tmp_path / "mine", "--size=32"]
    (filtered,) = run(tmp_path / "a", *arguments, f"--data={whole}", "--filter=score >= 3")
    (alone,) = run(tmp_path / "b", *arguments, f"--data={kept}", f"--index-dir={tmp_path / 'index'}")
    (all_of_it,) = run(tmp_path / "c", *arguments, f"--data={whole}")
    assert values(filtered) == values(alone) != values(all_of_it)
    assert filtered["drawn"] == {**all_of_it["drawn"], "filter": "score >= 3"}
    assert {value["num_real"] for value in filtered["values"]} == {9}
    assert len({found["values"][0]["reference"] for found in (filtered, alone, all_of_it)}) == 3
    assert [*(tmp_path / "index").glob("*.npz")] and not [*kept.parent.glob("*.npz")]


def files(number, image, meta):
    return [(f"{number:03d}.png", image), (f"{number:03d}.json", json.dumps(meta).encode())]


def test_results_before_a_failure_are_written(tmp_path, metrics, capsys):
    images(tmp_path / "good", 30)
    images(tmp_path / "bad", 30, seed=1)
    broken = tmp_path / "bad" / "007.png"
    broken.write_bytes(broken.read_bytes()[:900])
    out = f"--out={tmp_path / 'out'}"
    candidates = ["--images", str(tmp_path / "good"), str(tmp_path / "bad")]
    command = [out, metrics, "--device=cpu", *candidates, f"--reference={tmp_path / 'good'}"]
    assert evaluate.main(command) == 2
    output = capsys.readouterr()
    assert f"'{broken}' cannot be read" in output.err and f"| {tmp_path / 'good'} |" in output.out
    (result,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert result["candidate"] == str(tmp_path / "good")


def test_real_images_are_named_by_what_they_are_and_their_statistics_found_again(chain, tmp_path):
    clip = f"--clip={chain.runs / 'clip'}"
    images(tmp_path / "mine", 20)
    cache, moved = tmp_path / "statistics", tmp_path / "moved" / "val-000000.tar"
    moved.parent.mkdir()
    moved.write_bytes((chain.shards / "val-000000.tar").read_bytes())
    found = [
        run(
            tmp_path / "a",
            "--images",
            tmp_path / "mine",
            f"--data={shards}",
            "--size=32",
            clip,
            f"--cache={cache}",
        )
        for shards in (chain.shards / "val-000000.tar", moved, moved)
    ]
    references = {
        value["reference"] for (result,) in found for value in result["values"] if "reference" in value
    }
    assert len(references) == 1 and found[0] == found[1] == found[2]
    assert len(list(cache.iterdir())) == 2  # the copy is younger


def test_a_sweep_of_steps_is_one_curve():
    stage = SimpleNamespace(sampler=DDIM(), device="cpu")
    found = list(settings(Sweep(steps=[5, 10], guidances=[3.0]), stage))
    assert [setting.label for setting in found] == ["steps=5 guidance=3", "steps=10 guidance=3"]
    assert {setting.series for setting in found} == {"guidance=3"}
    assert [setting.overrides["sampler"].num_steps for setting in found] == [5, 10]
    sweep = Sweep(guidances=[Unguided(), Interval(Rescaled(3.0), 100, 800)])
    labels = [setting.label for setting in settings(sweep, stage)]
    assert labels == ["guidance=Unguided()", "guidance=Interval(100, 800, Rescaled(3, 0.7))"]


@pytest.mark.slow
def test_guidances_of_any_class_are_compared_with_scales(chain, tmp_path):
    checkpoint = str(chain.runs / "diffusion")
    weaker = {"class_path": "Autoguidance", "init_args": {"checkpoint": checkpoint, "scale": 2}}
    results = run(
        *(tmp_path / "out", "--checkpoint", checkpoint, f"--data={chain.shards / 'val-000000.tar'}"),
        *(f"--clip={chain.runs / 'clip'}", "--num-images=8", "--steps", 2),
        *("--guidance", "1", json.dumps(weaker), '{"class_path": "Unguided"}'),
    )
    alone, itself, unguided = results
    assert itself["candidate"] == f"{checkpoint} steps=2 guidance=Autoguidance(2)"
    assert (
        f"checkpoint={checkpoint}, sha256={Checkpoint.open(checkpoint).sha256}" in itself["drawn"]["guidance"]
    )
    assert values(unguided)["fid/clip"] == values(alone)["fid/clip"]
    # a model guided by itself draws what it draws alone, but for rounding
    assert values(itself)["fid/clip"] == pytest.approx(values(alone)["fid/clip"], rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("autoencoder", ["--steps", "7"], "--steps: got one, but no --checkpoint is of a diffusion stage"),
        (
            "autoencoder",
            ["--guidance", "3"],
            "--guidance: got one, but no --checkpoint is of a diffusion stage",
        ),
        ("autoencoder", ["--classes=x"], "--classes: got one, but no --checkpoint is of a CLIP"),
        (
            "autoencoder",
            ["--negative-prompt=x"],
            "--negative-prompt: got one, but no --checkpoint is of a diff",
        ),
        (
            "diffusion",
            ["--negative-prompt=x", "--guidance", "1"],
            "is drawn without guidance that uses it: expected e.g. --guidance 3",
        ),
        (
            "autoencoder",
            ["--negative-prompt=x"],
            "--negative-prompt: got one, but no --checkpoint is of a diffusion stage",
        ),
        (
            "diffusion",
            ["--negative-prompt=x", "--guidance", "1"],
            "is drawn without guidance that uses it: expected e.g. --guidance 3",
        ),
        ("diffusion", ["--lpips=x"], "--lpips: compares reconstructions, expected an autoencoder"),
    ],
)
def test_an_option_without_effect_is_refused(chain, metrics, capsys, stage, more, message):
    command = ["--checkpoint", str(chain.runs / stage), f"--data={chain.shards / 'val-000000.tar'}", metrics]
    assert message in error_of(capsys, [*command, "--device=cpu", *more], evaluate.main)


def test_checkpoints_of_other_sizes_are_not_drawn_at_one(capsys):
    stages = [
        TrainedStage("a", SimpleNamespace(name="diffusion", image_size=32)),
        TrainedStage("b", SimpleNamespace(name="diffusion", image_size=64)),
    ]
    options = Namespace(
        sampler=None, steps=[], guidance=[], classes=None, templates=None, size=None, negative_prompt=None
    )
    with pytest.raises(ValueError, match=r"--size: got none, but .* different sizes: a 32, b 64"):
        check_stages(options, stages)
    options.size = 32
    check_stages(options, stages)


@pytest.mark.slow
def test_an_autoencoder_and_a_clip_are_measured_on_real_images(chain, tmp_path, metrics):
    shards = f"--data={chain.shards / 'val-000000.tar'}"
    (result,) = run(tmp_path / "a", "--checkpoint", chain.runs / "autoencoder", shards, metrics)
    assert {"psnr", "ssim", "fid/coarse"} <= values(result).keys()
    (result,) = run(tmp_path / "b", "--checkpoint", chain.runs / "clip", shards)
    found = values(result)
    assert found["image_to_text@10/clip"] >= found["image_to_text@5/clip"] >= found["image_to_text@1/clip"]


@pytest.mark.slow
def test_each_clip_is_measured_with_itself(chain, fresh, tmp_path):
    assert fit.main(fresh.arguments("clip", "--seed_everything=1", "--trainer.max_steps=4")) == 0
    candidates = [chain.runs / "clip", fresh.runs / "clip"]
    shards = f"--data={chain.shards / 'val-000000.tar'}"
    results = run(tmp_path / "both", "--checkpoint", *candidates, shards)
    for path, result in zip(candidates, results, strict=True):
        (alone,) = run(tmp_path / path.parent.name, "--checkpoint", path, shards)
        assert values(result) == values(alone)
    hashes = [result["values"][0]["weights_sha256"] for result in results]
    assert hashes[0] != hashes[1] and values(results[0]) != values(results[1])


@pytest.mark.slow
def test_a_clip_knows_classes_in_training_as_it_does_afterwards(fresh, tmp_path):
    pack_digits(tmp_path / "digits", num_val=40, size=32)
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(WORDS))
    shards = [f"--data.{part}={tmp_path / 'digits'}/{part}-*.tar" for part in ("train", "val")]
    matching = f"--trainer.callbacks.classes={classes}"
    assert fit.main(fresh.arguments("clip", *shards, matching)) == 0
    lines = (fresh.runs / "clip" / "evaluations.jsonl").read_text().splitlines()
    during = {line["name"]: line for line in map(json.loads, lines) if line["samples"] == 64}
    (after,) = run(
        tmp_path / "out",
        "--checkpoint",
        fresh.runs / "clip",
        f"--data={tmp_path}/digits/val-*.tar",
        f"--classes={classes}",
    )
    assert {"zero_shot@1", "zero_shot@5", "image_to_text@1/clip"} <= values(after).keys()
    assert {f"val/{name}": value for name, value in values(after).items()} == {
        name: line["value"] for name, line in during.items()
    }
    (message,) = (value for value in after["values"] if value["name"] == "zero_shot@1")
    assert message["classes_sha256"] == during["val/zero_shot@1"]["classes_sha256"]
    assert (message["num"], message["num_classes"], len(message["weights_sha256"])) == (40, 10, 64)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(chain, tmp_path, metrics):
    (tmp_path / "metrics.yaml").write_text(PIXELS + THEIRS)
    arguments = [
        f"--checkpoint={chain.runs / 'diffusion'}",
        "--save-images",
        "--device=cpu",
        metrics,
        f"--data={chain.shards / 'val-000000.tar'}",
        "--num-images=13",
        "--steps",
        "2",
        "--batch-size=1",
    ]
    alone = run(tmp_path / "one", *arguments)
    paths = [str(ROOT), str(SUPPORT)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launched = subprocess.run(
        [*launch, "-m", "ldm.evaluate", *arguments, "--num-workers=1", f"--out={tmp_path / 'two'}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())["results"]
    found, expected = values(two[0]), values(alone[0])
    theirs = [numbers.pop("their_ssim") for numbers in (found, expected)]  # its sums are float32
    assert theirs[0] == pytest.approx(theirs[1], abs=1e-6)
    assert theirs[0] == pytest.approx(expected["ssim"], rel=1e-3)
    assert found == pytest.approx(expected, rel=1e-10)
    files = [next((tmp_path / name).glob("*.npz")) for name in ("one", "two")]
    assert np.array_equal(np.load(files[0])["arr_0"], np.load(files[1])["arr_0"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "got neither --checkpoint nor --images"),
        (["--images", "nowhere"], "got neither --data nor --reference"),
        (["--images", "nowhere", "--reference=empty"], "folder 'empty' holds none, expected some of .png"),
        (
            ["--images", "mixed", "--reference=good"],
            "16 x 16 pixels, expected 32 x 32 like 'mixed/00",
        ),
        (["--images", "good", "--reference=good", "--filter=a > 1"], "--filter: got one, but no --data"),
        (["--images", "small", "--reference=good"], "its images have side 16, the real ones 32"),
        (["--images", "good", "--reference=gone.npz"], "--reference: 'gone.npz' does not exist"),
        (["--images", "good", "--reference=page.npz"], "--reference: 'page.npz' is no .npz of arrays"),
        (
            ["--images", "good", "--reference=mu.npz"],
            "has no images 'arr_0', which --metrics need",
        ),
        (["--images", "page.npz", "--reference=good"], "page.npz' holds no images 'arr_0'"),
        (
            ["--images", "good", "--reference=good", "--num-images=41"],
            "got 41, but 'good' holds 40",
        ),
        (
            ["--images", "good", "--reference=good", "--precision=8"],
            "--precision: got 8, expected one of '32-true'",
        ),
        (
            ["--images", "good", "--reference=good", "--inception=gone.pth"],
            "--inception: weights 'gone.pth' do not exist",
        ),
        (["--checkpoint", "gone", "--reference=good"], "--data: got none, expected shards"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, metrics, more, message):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "good", 40)
    images(tmp_path / "small", 40, 16)
    images(tmp_path / "mixed", 3)
    Image.new("RGB", (16, 16)).save(tmp_path / "mixed" / "zzz.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.npz").write_text("<html>")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(12), sigma=np.eye(12))
    assert message in error_of(capsys, [metrics, "--device=cpu", "--out=out", *more], evaluate.main)


def test_no_metric_at_all_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "good", 4)
    line = error_of(capsys, ["--images", "good", "--reference=good", "--device=cpu"], evaluate.main)
    assert "got no metric, expected --inception, --clip, --lpips or --metrics" in line
