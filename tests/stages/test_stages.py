"""The stages as plain modules, without a trainer."""

import math

import pytest
import torch
from torch import nn

from ldm.conditioners.label import ClassLabel
from ldm.conditioners.none import Unconditional
from ldm.conditioners.text import CLIPText
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import EDM, Velocity
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.schedule import ScaledLinear
from ldm.diffusion.timesteps import LogNormal
from ldm.diffusion.variance_exploding import VarianceExploding
from ldm.io.checkpoint import Checkpoint
from ldm.latents.space import AutoencoderLatents, Pixels
from ldm.nets.text import num_tokens
from ldm.optim.recipes import AdamW, Muon
from ldm.rng import SampleNoise
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.clip import CLIP
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import CLIPTower, build_stage, load_stage
from ldm.stages.terms import without_terms
from ldm.types import Cond

ROUNDING = 1e-5
"""Two ways to one number of size 1 through a few layers of float32: with gradients or without, or in another
layout, a processor may take other kernels."""

AUTOENCODER = {
    "class_path": "ldm.stages.autoencoder.Autoencoder",
    "init_args": {
        "net": {
            "class_path": "ldm.nets.autoencoder.KLAutoencoder",
            "init_args": {
                "latent_channels": 3,
                "block_out_channels": [8, 8],
                "layers_per_block": 1,
                "norm_groups": 4,
            },
        }
    },
}
CLIP_CONFIG = {
    "class_path": "ldm.stages.clip.CLIP",
    "init_args": {
        "net": {
            "class_path": "ldm.nets.clip.CLIPModel",
            "init_args": {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
                "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
            },
        }
    },
}
UNET = {
    "class_path": "ldm.nets.unet.UNet",
    "init_args": {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "attention": [True, True],
        "num_heads": 2,
        "norm_groups": 4,
    },
}


def diffusion_config(latents, conditioner):
    return {
        "class_path": "ldm.stages.diffusion.Diffusion",
        "init_args": {
            "latents": latents,
            "conditioner": conditioner,
            "denoiser": UNET,
            "sampler": {"class_path": "ldm.diffusion.samplers.ddim.DDIM", "init_args": {"num_steps": 3}},
            "guidance": {"class_path": "ldm.diffusion.guidance.ClassifierFree", "init_args": {"scale": 2.0}},
        },
    }


def save(stage, path):
    state = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(state)
    torch.save(state, path)
    return str(path)


def batch(n=4, size=16):
    generator = torch.Generator().manual_seed(0)
    return {
        "key": [f"k{i}" for i in range(n)],
        "image": torch.rand(n, 3, size, size, generator=generator) * 2 - 1,
        "text": [f"image number {i}" for i in range(n)],
        "label": torch.arange(n) % 3,
    }


@pytest.fixture
def trained(tmp_path):
    """Checkpoints of a tiny autoencoder and a tiny CLIP, as a run would leave them."""
    torch.manual_seed(0)
    autoencoder = build_stage(AUTOENCODER)
    autoencoder.latent_mean.fill_(0.5)
    autoencoder.latent_std.fill_(2.0)
    return save(autoencoder, tmp_path / "ae.ckpt"), save(build_stage(CLIP_CONFIG), tmp_path / "clip.ckpt")


def text_to_image(trained):
    return build_stage(
        diffusion_config(
            {"class_path": "ldm.latents.space.AutoencoderLatents", "init_args": {"checkpoint": trained[0]}},
            {"class_path": "ldm.conditioners.text.CLIPText", "init_args": {"checkpoint": trained[1]}},
        )
    )


def test_a_checkpoint_alone_rebuilds_its_stage(trained, tmp_path):
    for path, kind in zip(trained, (Autoencoder, CLIP), strict=True):
        first, second = load_stage(path, kind), load_stage(path, kind)
        assert first.config == second.config
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    stage = text_to_image(trained)
    stage.image_size = 16
    again = load_stage(save(stage, tmp_path / "ldm.ckpt"), Diffusion)
    images = [s.eval().generate({"key": ["a"], "text": ["a cat"]}, seed=1) for s in (stage, again)]
    assert torch.equal(*images)


def test_wrong_missing_damaged_and_unmeasured_checkpoints_are_refused_by_name(trained, tmp_path):
    with pytest.raises(ValueError, match=r"clip\.ckpt' is of stage 'clip', expected stage 'autoencoder'"):
        AutoencoderLatents(trained[1])
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        CLIPText(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"folder without checkpoints/last\.ckpt"):
        CLIPText(str(tmp_path))
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "ae.ckpt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.ckpt' cannot be read"):
        AutoencoderLatents(str(tmp_path / "cut.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="names no stage"):
        Checkpoint.open(tmp_path / "foreign.ckpt")
    unmeasured = save(build_stage(AUTOENCODER), tmp_path / "early.ckpt")
    with pytest.raises(ValueError, match="no measured latent scale"):
        AutoencoderLatents(unmeasured)


def test_the_latent_space_inverts_its_own_normalisation(trained):
    space = AutoencoderLatents(trained[0])
    stage = load_stage(trained[0], Autoencoder)
    data = batch()
    posterior = stage.net.encode(data["image"])
    z = space.encode(data, torch.zeros_like(posterior.mean))
    assert torch.allclose(z, (posterior.mean - 0.5) / 2.0, atol=ROUNDING)
    assert torch.allclose(space.decode(z), stage.generate(data, 0), atol=ROUNDING)
    assert not space.state_dict(), "upstream weights are not saved again"


def test_latents_encoded_before_are_latents_encoded_now(trained):
    space = AutoencoderLatents(trained[0])
    data = batch()
    posterior = space.net.module.encode(data["image"])
    noise = torch.randn_like(posterior.mean)
    stored = {"key": data["key"], "latent": torch.cat([posterior.mean, posterior.std], 1)}
    assert torch.allclose(space.encode(data, noise), space.encode(stored, noise), atol=ROUNDING)


def test_images_do_not_depend_on_how_a_set_is_split(trained):
    stage = text_to_image(trained).eval()
    data = batch()
    images = stage.generate(data, seed=3)
    part = {k: v[2:] for k, v in data.items()}
    assert torch.allclose(images[2:], stage.generate(part, seed=3), atol=1e-5)
    assert not torch.allclose(images, stage.generate(data, seed=4), atol=1e-2)


def test_only_the_denoiser_and_a_learned_condition_train(trained):
    names = {n.split(".")[0] for n, p in text_to_image(trained).named_parameters() if p.requires_grad}
    assert names == {"denoiser"}
    pixels = Diffusion(Pixels(), ClassLabel(3, 8), lambda w: build_unet(w))
    assert {n.split(".")[0] for n, _ in pixels.named_parameters()} == {"denoiser", "conditioner"}


def build_unet(widths):
    from ldm.nets.unet import UNet

    return UNet(widths, **UNET["init_args"])


def test_any_module_that_is_called_like_a_denoiser_is_one():
    """It is called as ldm.types.Denoiser states, in training and in sampling."""

    class Foreign(nn.Conv2d):
        def __init__(self, widths):
            super().__init__(widths.sample, widths.sample, 1)
            self.calls = []

        def forward(self, x_t, t, cond):
            self.calls.append((x_t, t, cond))
            return super().forward(x_t)

    for prediction, dtype in ((Velocity(), torch.int64), (EDM(), torch.float32)):
        data, objective = batch(), Objective(ScaledLinear(), prediction)
        stage = Diffusion(Pixels(), Unconditional(), Foreign, objective, DDIM(2))
        stage.losses(data, SampleNoise(0, data["key"]))
        stage.generate(data, 0)
        assert len(stage.denoiser.calls) == 3
        for x_t, t, cond in stage.denoiser.calls:
            assert x_t.shape == data["image"].shape and isinstance(cond, Cond)
            assert t.shape == (len(data["key"]),) and t.dtype == dtype


@pytest.mark.parametrize(
    ("schedule", "std"), [(VarianceExploding(sigma_max=50.0), 50.0), (ScaledLinear(), 1.0)]
)
def test_sampling_starts_with_the_noise_of_its_schedule(schedule, std):
    class Start(DDIM):
        def __call__(self, denoise, steps, x, noise):
            self.started = x
            return super().__call__(denoise, steps, x, noise)

    objective, data = Objective(schedule, EDM(), timesteps=LogNormal()), batch()
    stage = Diffusion(Pixels(), Unconditional(), build_unet, objective, Start(3)).train()
    assert stage.losses(data, SampleNoise(0, data["key"]))["loss"].isfinite()
    assert stage.eval().generate(data, 0).isfinite().all()
    expected = std * SampleNoise(0, data["key"]).like(data["image"])
    assert torch.equal(stage.sampler.started, expected)


def test_every_parameter_of_every_stage_gets_a_gradient(trained):
    stages = [
        build_stage(AUTOENCODER),
        build_stage(CLIP_CONFIG),
        text_to_image(trained),
        Diffusion(Pixels(), Unconditional(), build_unet),
        Diffusion(Pixels(), ClassLabel(3, 8, dropout=0.5), build_unet),
    ]
    for stage in stages:
        data = batch()
        stage.train().losses(data, SampleNoise(0, data["key"]))["loss"].backward()
        missing = [n for n, p in stage.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, (stage.name, missing)


def test_condition_dropout_gives_the_null_condition_to_its_fraction():
    conditioner = ClassLabel(3, 8, dropout=0.25)
    data = {"key": list("abcdefgh"), "label": torch.arange(8) % 3}
    dropped = SampleNoise(0, data["key"]).uniform() < 0.25
    vectors = conditioner.dropped(data, SampleNoise(0, data["key"])).vector
    assert 0 < dropped.sum() < len(dropped)
    assert torch.equal(vectors[dropped], conditioner.null(data).vector[dropped])
    assert torch.equal(vectors[~dropped], conditioner(data).vector[~dropped])


def test_guidance_of_one_ignores_the_null_condition(trained):
    stage = text_to_image(trained).eval()
    data = batch()
    stage.guidance = ClassifierFree(1.0)
    before = stage.generate(data, 0)
    stage.conditioner.null = None
    stage.conditioner.null = lambda data: stage.conditioner({"text": ["other"] * len(data["key"])})
    assert torch.equal(before, stage.generate(data, 0))


def test_the_contrastive_loss_is_its_formula():
    stage = build_stage(CLIP_CONFIG)
    data = batch()
    loss = stage.losses(data, SampleNoise(0, data["key"]))["loss"]
    image, text = stage.encode_image(data["image"]), stage.encode_text(data["text"])
    logits = math.exp(stage.net.model.logit_scale.item()) * image @ text.T
    by_hand = -(logits.log_softmax(0).diagonal().mean() + logits.log_softmax(1).diagonal().mean()) / 2
    assert torch.allclose(loss, by_hand, rtol=1e-5)


def test_clip_tokens_end_where_the_caption_ends(trained):
    tower = CLIPTower(trained[1])
    tokens = tower.module.tokenize(["a cat", "one two three four five six seven eight nine"])
    assert tokens[0, :4].tolist()[0] == 49406 and tokens[0, 3] == 49407 and tokens[0, 4:].sum() == 0
    assert tokens[1, -1] == 49407, "what is cut off still ends with the end mark"
    assert num_tokens("a cat") == 4


def test_learning_rate_warms_up_and_decays_to_zero():
    for recipe in (AdamW(warmup=10), Muon(warmup=10)):
        assert recipe.factor(0, 100) == pytest.approx(0.1)
        assert recipe.factor(9, 100) == recipe.factor(10, 100) == 1.0
        assert recipe.factor(55, 100) == pytest.approx(0.5)
        assert recipe.factor(100, 100) == pytest.approx(0.0)
        assert recipe.factor(10_000, -1) == 1.0
    assert AdamW(warmup=0, decay="linear").factor(25, 100) == pytest.approx(0.75)


def test_muon_leaves_embeddings_and_vectors_to_adam():
    stage = build_stage(CLIP_CONFIG)
    matrices, rest = Muon().build(stage).param_groups
    names = {id(p): n for n, p in stage.named_parameters()}
    by_adam = {names[id(p)] for p in rest["params"]}
    assert "net.model.token_embedding.weight" in by_adam and "net.model.positional_embedding" in by_adam
    assert "net.model.logit_scale" in by_adam
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert len(matrices["params"]) + len(rest["params"]) == len(names)


def test_a_checkpoint_cannot_name_a_class_of_its_liking(tmp_path):
    stage = build_stage(AUTOENCODER)
    stage.latent_mean.zero_()
    stage.latent_std.fill_(1.0)
    state = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(state)
    state["config"]["init_args"]["net"] = {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}
    torch.save(state, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"class subprocess\.Popen, expected a KLAutoencoder"):
        AutoencoderLatents(str(tmp_path / "evil.ckpt"))


def test_upstream_runs_may_move_but_not_change(trained, tmp_path):
    stage = text_to_image(trained)
    state = {"upstream": {f"elsewhere/{i}": sha for i, sha in enumerate(stage.upstream().values())}}
    stage.check_upstream(state)
    with pytest.raises(ValueError, match=r"upstream checkpoint '.*' changed since this run began"):
        stage.check_upstream({"upstream": {trained[0]: "0" * 64}})


def test_pixel_space_keeps_estimates_in_range_and_latent_space_does_not(trained):
    def far(x, t):
        return torch.full_like(x, 5.0)

    x, t = torch.zeros(1, 3, 2, 2), torch.zeros(1)
    assert Pixels().constrain(far)(x, t).max() == 1.0
    assert AutoencoderLatents(trained[0]).constrain(far)(x, t).max() == 5.0


class _Bias(Autoencoder):
    """With a parameter that is in no submodule."""

    def __init__(self, net):
        super().__init__(net, optimizer=AdamW())
        self.bias = torch.nn.Parameter(torch.zeros(3))


def test_the_recipe_is_for_every_parameter_but_those_of_loss_terms():
    stage = _Bias(build_stage(AUTOENCODER).net)
    found = {name for name, _ in without_terms(stage).named_parameters()}
    assert found == set(stage.averaged_parameters()) and "bias" in found
