"""Captions as a condition: the tower frozen, or trained along."""

import pytest
import torch
from clip_tokens import text_tokens

from ldm.conditioners.composite import Composite
from ldm.conditioners.label import ClassLabel
from ldm.conditioners.text import CLIPText
from ldm.io.checkpoint import header
from ldm.nets.clip import CLIPModel
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import build_stage, load_stage

CLIP = {
    "class_path": "ldm.nets.clip.CLIPModel",
    "init_args": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 2},
    },
}
UNET = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "attention": [True, True],
    "num_heads": 2,
    "norm_groups": 4,
}
DATA = {
    "key": ["a", "b", "c"],
    "image": torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    "text": ["a cat", "two dogs on a mat", "nothing to see"],
}


def save(stage, path):
    state = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(state)
    torch.save(state, path)
    return str(path)


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    stage = build_stage({"class_path": "ldm.stages.clip.CLIP", "init_args": {"net": CLIP}})
    return save(stage, tmp_path / "clip.ckpt"), stage.net


@pytest.fixture
def tower(clip, tmp_path):
    """A checkpoint that is nothing but a text tower."""
    tower = clip[1].text_tower()
    state = {"stage": "text_tower", "config": tower.config, "state_dict": tower.state_dict()} | header()
    torch.save(state, tmp_path / "tower.ckpt")
    return str(tmp_path / "tower.ckpt")


def diffusion(checkpoint, frozen):
    """A stage on pixels; guided, so that validation and sampling encode the null condition too."""
    return build_stage(
        {
            "class_path": "ldm.stages.diffusion.Diffusion",
            "init_args": {
                "latents": {"class_path": "ldm.latents.space.Pixels"},
                "conditioner": {
                    "class_path": "ldm.conditioners.text.CLIPText",
                    "init_args": {"checkpoint": checkpoint, "frozen": frozen, "dropout": 0.5},
                },
                "denoiser": {"class_path": "ldm.nets.unet.UNet", "init_args": UNET},
                "optimizer": {"class_path": "ldm.optim.recipes.AdamW", "init_args": {"lr": 1e-2}},
            },
        }
    )


def train(stage, steps=3):
    optimizer = stage.optimizer.build(stage)
    for step in range(steps):
        optimizer.zero_grad()
        stage.train().losses(DATA, SampleNoise(step, DATA["key"]))["loss"].backward()
        optimizer.step()


def test_tokens_are_those_of_the_clip_and_of_the_bare_tower(clip, tower):
    path, net = clip
    expected = text_tokens(net, DATA["text"])
    for checkpoint in (path, tower):
        found = CLIPText(checkpoint)(DATA).tokens
        assert (found - expected).norm() < 1e-5 * expected.norm()
    null = CLIPText(path).null({"key": ["a", "b"]})
    assert torch.equal(null.tokens, CLIPText(path)({"text": ["", ""]}).tokens)


def test_the_penultimate_layer_is_the_tower_with_a_layer_less(clip, tower):
    tokens = clip[1].model.forward_intermediates(
        text=clip[1].tokenize(DATA["text"]), text_indices=2, normalize_intermediates=True
    )["text_intermediates"][0]
    for checkpoint in (clip[0], tower):
        assert torch.allclose(CLIPText(checkpoint, clip_skip=1)(DATA).tokens, tokens, atol=1e-5)


def test_a_frozen_tower_is_neither_trained_nor_saved(clip):
    stage = diffusion(clip[0], frozen=True)
    before = stage.conditioner.tower.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    train(stage)
    assert all(torch.equal(before[k], v) for k, v in stage.conditioner.tower.state_dict().items())
    assert not any(name.startswith("conditioner") for name in stage.state_dict())
    assert not stage.conditioner(DATA).tokens.requires_grad


def test_a_trained_tower_changes_is_saved_and_is_what_a_checkpoint_gives_back(clip, tower, tmp_path):
    for checkpoint in (clip[0], tower):
        stage = diffusion(checkpoint, frozen=False)
        before = {k: v.clone() for k, v in stage.conditioner.tower.state_dict().items()}
        train(stage)
        trained = stage.conditioner.tower.state_dict()
        assert all(not torch.equal(before[k], v) for k, v in trained.items())
        again = load_stage(save(stage, tmp_path / "diffusion.ckpt"), Diffusion)
        assert all(torch.equal(v, trained[k]) for k, v in again.conditioner.tower.state_dict().items())
        assert torch.equal(again.conditioner(DATA).tokens, stage.conditioner(DATA).tokens)


def test_a_trained_tower_has_no_parameter_without_a_gradient(clip):
    stage = diffusion(clip[0], frozen=False)
    stage.train().losses(DATA, SampleNoise(0, DATA["key"]))["loss"].backward()
    assert all(p.grad is not None for p in stage.parameters())
    names = {n for n, _ in stage.named_parameters() if n.startswith("conditioner")}
    assert names == {f"conditioner.text.{n}" for n in clip[1].text_tower().state_dict()}, "no image tower"


def test_other_stages_and_classes_are_refused(clip, tower, tmp_path):
    stage = diffusion(clip[0], frozen=True)
    with pytest.raises(ValueError, match="of stage 'diffusion', expected stage 'clip' or 'text_tower'"):
        CLIPText(save(stage, tmp_path / "diffusion.ckpt"))
    state = torch.load(tower)
    torch.save(state | {"config": CLIP}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"class ldm\.nets\.clip\.CLIPModel, expected a TextTower"):
        CLIPText(str(tmp_path / "evil.ckpt"))


def test_the_text_tower_alone_and_the_full_clip_build_the_same_denoiser_from_a_seed(clip):
    torch.manual_seed(3)
    CLIPModel(**CLIP["init_args"])
    expected = torch.rand(3)
    torch.manual_seed(3)
    CLIPText(clip[0])
    assert torch.equal(torch.rand(3), expected)


def in_chunks(path):
    conditioner = CLIPText(path)
    conditioner.long_prompts = "chunks"
    return conditioner


WORDS = ["red", "ring", "blue", "square", "green", "disc", "pink", "star", "big", "cat"]  # a byte pair each


def test_a_long_caption_is_its_chunks_one_after_the_other(clip):
    parts = [" ".join(WORDS[:6]), " ".join(WORDS[6:])]  # of 8 tokens, begin and end marks included
    whole = in_chunks(clip[0])({"text": [" ".join(WORDS), "a cat"]})
    alone = CLIPText(clip[0])({"text": [*parts, "a cat"]}).tokens
    assert whole.tokens.shape == (2, 16, 16)
    torch.testing.assert_close(whole.tokens[0], alone[:2].flatten(0, 1))
    torch.testing.assert_close(whole.tokens[1, :8], alone[2])
    assert whole.mask[0].all() and whole.mask[1].tolist() == [True] * 8 + [False] * 8


def test_captions_that_fit_are_read_as_ever(clip):
    batch = {"key": ["a", "b"], "text": ["a cat", " ".join(WORDS[:6])]}
    ours, theirs = in_chunks(clip[0]), CLIPText(clip[0])
    assert torch.equal(ours(batch).tokens, theirs(batch).tokens) and ours(batch).mask is None
    assert torch.equal(ours.null(batch).tokens, theirs.null(batch).tokens)


def test_an_image_does_not_depend_on_the_length_of_other_captions(clip):
    stage = diffusion(clip[0], frozen=True).eval()
    stage.conditioner.long_prompts = "chunks"
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500, 500])
    batch = {"key": ["a", "b"], "text": ["a cat", " ".join(WORDS)]}
    alone = {"key": ["a"], "text": ["a cat"]}
    with torch.no_grad():
        for found, expected in zip(
            stage.estimates().cond_and_uncond(batch)(x, t),
            stage.estimates().cond_and_uncond(alone)(x[:1], t[:1]),
            strict=True,
        ):
            torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-5)


def test_the_null_condition_is_that_of_what_is_guided_away_from(clip):
    batch = {**DATA, "negative_text": ["a dog", "", " ".join(WORDS)]}
    for conditioner in (CLIPText(clip[0]), in_chunks(clip[0])):
        null, negative = conditioner.null(batch), conditioner({"text": batch["negative_text"]})
        assert torch.equal(null.tokens, negative.tokens)
        assert conditioner(batch).tokens.shape == null.tokens.shape  # they are computed in one pass
    empty = CLIPText(clip[0]).null({**DATA, "negative_text": [""] * 3}).tokens
    torch.testing.assert_close(empty, CLIPText(clip[0]).null(DATA).tokens)


def test_combined_with_another_condition_what_is_guided_away_from_counts(clip):
    label = ClassLabel(3)
    batch = {**DATA, "label": torch.arange(3), "negative_text": ["a dog"] * 3}
    for dropout in (0.0, 0.5):
        text = CLIPText(clip[0], dropout=dropout)
        null = Composite([text, label]).null(batch)
        assert torch.equal(null.tokens, text({"text": batch["negative_text"]}).tokens)
