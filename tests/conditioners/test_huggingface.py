"""Any text encoder of transformers as a condition: the same tokens as there, frozen, whatever the batch."""

import shutil
import sys

import pytest
import torch
from text_models import WORDS, write_qwen, write_t5, write_t5gemma

from ldm.conditioners.composite import Composite
from ldm.conditioners.huggingface import HFText
from ldm.io.upstream import upstream_options
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import build_stage, load_stage

pytest.importorskip("transformers")
TEXT = ["a red ring", "", "a large blue disc and a small green star in the square"]
WRITERS = {"t5": write_t5, "qwen": write_qwen, "t5gemma": write_t5gemma}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {name: write(root / name) for name, write in WRITERS.items()}


def theirs(folder, caption, layer):
    """Hidden states by transformers itself, of one caption without padding."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt")["input_ids"]
    ids = ids if ids.numel() else torch.tensor([[1]])  # the end mark
    model = AutoModel.from_pretrained(folder).eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    with torch.no_grad():
        return model(input_ids=ids.long(), output_hidden_states=True).hidden_states[
            {"last": -1}.get(layer, -2)
        ]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_tokens_are_those_of_transformers_and_padding_is_masked(folders, name, layer):
    conditioner = HFText(folders[name], max_length=16, layer=layer)
    cond = conditioner({"text": TEXT})
    assert cond.tokens.shape == (3, 16, 16) and conditioner.token_width == 16
    for i, caption in enumerate(TEXT):
        expected = theirs(folders[name], caption, layer)[0]
        count = len(expected)
        torch.testing.assert_close(cond.tokens[i, :count], expected, rtol=1e-4, atol=1e-5)
        assert cond.mask[i].tolist() == [True] * count + [False] * (16 - count)
        assert not cond.tokens[i, count:].any()


@pytest.mark.parametrize("name", WRITERS)
def test_the_null_condition_is_the_empty_caption(folders, name):
    conditioner = HFText(folders[name], max_length=8)
    null, empty = conditioner.null({"key": ["a", "b"]}), conditioner({"text": ["", ""]})
    torch.testing.assert_close(null.tokens, empty.tokens)
    assert torch.equal(null.mask, empty.mask) and null.mask.any(1).all()
    negative = conditioner.null({"key": ["a"], "negative_text": ["a red ring"]})
    assert torch.equal(negative.tokens, conditioner({"text": ["a red ring"]}).tokens)


def test_long_captions_are_cut_with_a_warning_and_counted(folders):
    conditioner = HFText(folders["t5"], max_length=4)
    batch = {"text": ["a red ring", " ".join(WORDS)]}
    with pytest.warns(UserWarning, match=r"1 of 2 captions are cut to the 4 tokens .* has 14"):
        conditioner.check(batch)
    assert conditioner(batch).tokens.shape == (2, 4, 16)
    assert conditioner.truncated(batch)["truncated_text"] == 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_type_is_what_the_encoder_computes_in(folders, dtype):
    narrow, wide = (
        HFText(folders["t5"], 8, dtype=each)({"text": TEXT[:1]}).tokens for each in (dtype, "float32")
    )
    assert narrow.dtype == torch.float32 and torch.equal(narrow, narrow.to(getattr(torch, dtype)).float())
    assert 0 < (narrow - wide).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):  # of mixed precision: the encoder has its own
        assert torch.equal(HFText(folders["t5"], 8)({"text": TEXT[:1]}).tokens, wide)


def stage(*folders, **more):
    members = [
        {"class_path": "ldm.conditioners.HFText", "init_args": {"folder": folder, "max_length": 8, **more}}
        for folder in folders
    ]
    text = members[0]
    if len(members) > 1:
        text = {"class_path": "ldm.conditioners.Composite", "init_args": {"conditioners": members}}
    unet = {"block_out_channels": [8, 8], "layers_per_block": 1, "attention": [True, True], "num_heads": 2}
    return build_stage(
        {
            "class_path": "ldm.stages.diffusion.Diffusion",
            "init_args": {
                "latents": {"class_path": "ldm.latents.space.Pixels"},
                "conditioner": text,
                "denoiser": {"class_path": "ldm.nets.unet.UNet", "init_args": {**unet, "norm_groups": 4}},
            },
        }
    )


BATCH = {"key": ["a", "b", "c"], "image": torch.zeros(3, 3, 8, 8), "text": TEXT}


def saved(model, path):
    state = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(state)
    torch.save(state, path)
    return state


def test_several_at_once_are_frozen_and_not_saved(folders, tmp_path):
    model = stage(folders["t5"], folders["qwen"], dropout=0.5)
    assert isinstance(model.conditioner, Composite)
    model.train().losses(BATCH, SampleNoise(0, BATCH["key"]))["loss"].backward()
    assert model.conditioner(BATCH).tokens.shape == (3, 16, 16)
    state = saved(model, tmp_path / "x.ckpt")
    assert not any(name.startswith("conditioner") for name in state["state_dict"])
    assert not any(name.startswith("conditioner") for name, _ in model.named_parameters())
    assert set(state["model_folders"]) == {folders["t5"], folders["qwen"]} and state["upstream"] == {}


def test_a_checkpoint_finds_the_folder_that_it_was_built_on(folders, tmp_path):
    moved = tmp_path / "runs" / "t5"
    shutil.copytree(folders["t5"], tmp_path / "first" / "t5")
    run = tmp_path / "runs" / "diffusion" / "checkpoints" / "last.ckpt"
    run.parent.mkdir(parents=True)
    model = stage(str(tmp_path / "first" / "t5"))
    saved(model, run)
    shutil.move(tmp_path / "first" / "t5", moved)  # beside the run
    again = load_stage(run, Diffusion)
    assert torch.equal(again.conditioner(BATCH).tokens, model.conditioner(BATCH).tokens)
    write_t5(moved, seed=1)
    with pytest.raises(ValueError, match=r"model '.*t5' has SHA-256 \w+, expected \w+, that of the folder"):
        load_stage(run, Diffusion)
    with upstream_options([f"t5={folders['t5']}"]):
        load_stage(run, Diffusion)


def test_a_changed_folder_is_noticed_on_resume(folders, tmp_path):
    state = saved(stage(folders["t5"]), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"model '.*qwen' changed since this run began"):
        stage(folders["qwen"]).check_upstream(state)


def without(folder, target, *names):
    shutil.copytree(folder, target)
    for name in names:
        (target / name).unlink()
    return str(target)


def test_what_cannot_be_read_is_one_clear_line(folders, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"'.*x' has no tokenizer, expected tokenizer.json or tokenizer_config"
    ):
        HFText(without(folders["t5"], tmp_path / "x", "tokenizer.json", "tokenizer_config.json"))
    with pytest.raises(ValueError, match=r"conditioner.folder: '.*y' cannot be read: .*safetensors"):
        HFText(without(folders["t5"], tmp_path / "y", "model.safetensors"))
    with pytest.raises(FileNotFoundError, match="model 'google/t5' does not exist, expected a local folder"):
        HFText("google/t5")
    with pytest.raises(ValueError, match="max_length: got 0"):
        HFText(folders["t5"], max_length=0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"HFText needs transformers, .* pip install 'ldm\[hf\]'"):
        HFText(folders["t5"])


def test_weights_that_are_missing_are_not_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = without(folders["t5"], tmp_path / "x")
    weights = load_file(tmp_path / "x" / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of T5EncoderModel, the first is encoder.block.1"):
        HFText(folder)
