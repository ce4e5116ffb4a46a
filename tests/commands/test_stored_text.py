"""Text embeddings stored beside latents: training from them is training with their encoder."""

import json
import shutil

import pytest
import torch
from comparing import error_of
from text_models import write_qwen, write_t5

from ldm import encode, fit, sample
from ldm.conditioners.huggingface import HFText
from ldm.data.module import Shards
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import model_folder_sha256

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
LENGTH = 24


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("text") / "t5")


@pytest.fixture(scope="module")
def stored(chain, home, t5, tmp_path_factory):
    """Shards of latents and text embeddings."""
    out = tmp_path_factory.mktemp("stored") / "latents"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert (
            encode.main([*chain.encode()[:-1], f"--out={out}", f"--text={t5}", f"--text-length={LENGTH}"])
            == 0
        )
    return out


def conditioner(folder, **more):
    options = {"folder": folder, "max_length": LENGTH, **more}
    return ["--model.conditioner=HFText", *(f"--model.conditioner.{k}={v}" for k, v in options.items())]


def test_tokens_and_null_are_those_of_the_encoder(chain, stored, t5):
    about = json.loads((stored / "latents.json").read_text())["text"]
    direct = HFText(t5, LENGTH)
    assert {k: about[k] for k in direct.text_encoder} == direct.text_encoder
    assert about["sha256"] == model_folder_sha256(t5) and about["folder"] == t5
    torch.testing.assert_close(torch.tensor(about["null"]), direct.encoder.module.null, rtol=1e-3, atol=1e-3)
    pattern = "train-{000000..000002}.tar"
    fields = ["latent", "text", "text_embedding"]
    data = Shards(
        [f"{stored}/{pattern}"], [f"{chain.shards}/{pattern}"], image_size=32, batch_size=60, fields=fields
    )
    batch = next(iter(data.train_dataloader()))
    assert {tokens.dtype for tokens in batch["text_embedding"]} == {torch.float16}
    ours, theirs = direct(batch), direct({"key": batch["key"], "text": batch["text"]})
    assert torch.equal(ours.mask, theirs.mask) and 2 < ours.mask.sum(1).min() < LENGTH
    torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-3, atol=1e-3)  # of float16


def test_training_from_them_is_training_with_the_encoder(chain, stored, t5, fresh, tmp_path):
    """And all but the captions' embeddings is as it was."""
    weights = []
    for name, folder in (("with", stored), ("without", chain.latents)):
        train = f"--data.train={folder}/train-{{000000..000002}}.tar"
        more = [f"--run={tmp_path / name}", train, "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
        assert fit.main(fresh.arguments("diffusion", *conditioner(t5), *more)) == 0
        weights.append(Checkpoint.open(tmp_path / name).state["callbacks"]["EMA"]["raw"])
    one, two = weights
    distance = sum((one[k] - two[k]).square().sum() for k in one) / sum(
        v.square().sum() for v in one.values()
    )
    assert 0 < distance.sqrt() < 1e-4
    images = [
        f"--checkpoint={tmp_path / 'with'}",
        "--prompt=a red ring",
        "--steps=2",
        f"--out={tmp_path / 'x'}",
    ]
    assert sample.main(images) == 0


def test_embeddings_of_another_encoder_are_refused(chain, stored, t5, fresh, tmp_path, capsys):
    train = f"--data.train={stored}/train-{{000000..000002}}.tar"
    arguments = fresh.arguments("diffusion", train)
    line = error_of(capsys, [*arguments, *conditioner(write_qwen(tmp_path / "qwen"))], fit.main)
    assert "text embeddings are of another encoder" in line and "sha256" in line and t5 in line
    line = error_of(capsys, [*arguments, *conditioner(t5, layer="penultimate")], fit.main)
    assert "layer last" in line and "expected layer penultimate" in line


def test_an_encoder_without_tokenizer_is_refused(t5, fresh, tmp_path, capsys):
    bare = shutil.copytree(t5, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    line = error_of(capsys, [*fresh.arguments("diffusion"), *conditioner(bare)])
    assert f"conditioner.folder: '{bare}' has no tokenizer, expected tokenizer.json or tokenizer" in line


def test_a_folder_of_other_embeddings_or_without_any_is_not_mixed(chain, stored, t5, tmp_path, capsys):
    command = [*chain.encode()[:-1], f"--out={stored}"]
    assert "holds text embeddings by {'sha256'" in error_of(capsys, command, encode.main)
    line = error_of(capsys, [*command, f"--text={t5}", "--text-length=8"], encode.main)
    assert "holds text embeddings by {'sha256'" in line and "'max_length': 8" in line
