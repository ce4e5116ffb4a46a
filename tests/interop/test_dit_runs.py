"""Transformers in and out: files of facebookresearch/DiT, folders that DiTPipeline and PixArt-alpha open."""

import json
from argparse import Namespace

import pytest
import torch
from tiny_model import AUTOENCODER, CAPTIONS, PER_CHANNEL, TEXT, randomised, relative

from ldm.conditioners.label import ClassLabel
from ldm.diffusion import prediction, schedule
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.spacing import Leading
from ldm.interop import dit_keys
from ldm.interop.diffusers import export_pipeline, import_folder
from ldm.interop.dit_file import export_dit, import_dit
from ldm.interop.dit_model import ImageTransformer, _arguments, read_transformer, write_transformer
from ldm.interop.latents import of_factor
from ldm.interop.model import Network, Process
from ldm.interop.runs import write_autoencoder
from ldm.interop.schedules import named, sampler
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import read_weights
from ldm.latents.space import AutoencoderLatents
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.dit import DiT
from ldm.nets.dit_blocks import DiTOptions
from ldm.nets.routing import Routing, Sprint
from ldm.nets.text import TextTower
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage
from ldm.types import Cond, DenoiserDims

diffusers = pytest.importorskip("diffusers")

SOURCE = {"program": "a test", "name": "tiny"}
HIDDEN, CLASSES = 24, 5
SHAPE = {"patch_size": 2, "hidden": HIDDEN, "depth": 2, "heads": 2}
LABELS = torch.tensor([0, 4, 2])
KEYS = ["a", "b", "c"]


def transformer(text=False, latents=PER_CHANNEL, output=8, kind=prediction.Epsilon, **options):
    """A transformer of classes, or of captions, with random weights; images of 16 pixels, 8 x 8 latents."""
    torch.manual_seed(0)
    widths = DenoiserDims(4, TEXT["width"] if text else None, None if text else HIDDEN, output=output)
    net = randomised(DiT(widths, **SHAPE, options=DiTOptions(**options)), 1)
    return ImageTransformer(
        Network({**SHAPE, "options": options, "position_grid": None}, net.state_dict()),
        Network(AUTOENCODER, randomised(KLAutoencoder(**AUTOENCODER), 2).state_dict()),
        latents,
        Process(named(schedule.Linear), named(kind), sampler(DDIM(50, spacing=Leading()))),
        16,
        None if text else torch.randn(CLASSES + 1, HIDDEN),
        Network(TEXT, randomised(TextTower(**TEXT), 3).state_dict()) if text else None,
    )


def same(found, expected, position_grid=None):
    """Whether two transformers are equal, bit for bit."""
    for name in ("dit", "autoencoder", "text"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert set(ours.weights) == set(theirs.weights)
            assert all(torch.equal(ours.weights[key], theirs.weights[key]) for key in ours.weights), name
    assert found.dit.arguments == {
        **expected.dit.arguments,
        "options": DiTOptions(**expected.dit.arguments["options"]).values,
        "position_grid": position_grid,
    }
    assert (found.table is None and expected.table is None) or torch.equal(found.table, expected.table)
    assert torch.equal(found.latents.mean, expected.latents.mean)
    assert torch.equal(found.latents.std, expected.latents.std)
    assert found.process.prediction == expected.process.prediction
    assert found.image_size == expected.image_size
    return True


def opened(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("output", [8, 4], ids=["learned variance", "plain"])
def test_a_run_opens_as_a_dit_pipeline_and_comes_back(tmp_path, output):
    model = transformer(as_diffusers=True, output=output, kind=prediction.Velocity)
    run = write_transformer(model, tmp_path / "ours", SOURCE)
    folder = export_pipeline(run, tmp_path / "theirs")
    pipeline = opened(folder)
    assert type(pipeline) is diffusers.DiTPipeline
    assert type(pipeline.transformer) is diffusers.DiTTransformer2DModel
    stage = load_stage(run, Diffusion)
    assert isinstance(stage.objective, LearnedVariance) == (output == 8)
    stage.sampler, stage.guidance = DDIM(5, spacing=Leading()), ClassifierFree(3.0)
    ours = stage.generate({"key": KEYS, "label": LABELS}, seed=0)
    x = SampleNoise(0, KEYS).like(torch.empty(3, 4, 8, 8))

    def given(*args, **kwargs):
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", given)
        theirs = pipeline(LABELS.tolist(), guidance_scale=3.0, num_inference_steps=5, output_type="np").images
    assert ((ours + 1) / 2 - torch.from_numpy(theirs).movedim(-1, 1)).abs().max() < 1e-4
    assert ours.std() > 0.1 and (ours[0] - ours[1]).abs().max() > 0.01
    again = read_transformer(Checkpoint.open(import_folder(folder, tmp_path / "again")))
    assert same(again, model, position_grid=4.0)


def test_a_run_of_captions_opens_as_pixart_alpha_and_comes_back(tmp_path):
    model = transformer(text=True, latents=of_factor(0.18215, 4))
    run = write_transformer(model, tmp_path / "ours", SOURCE)
    folder = export_pipeline(run, tmp_path / "theirs")
    pipeline = opened(folder)
    assert type(pipeline) is diffusers.PixArtAlphaPipeline
    stage = load_stage(run, Diffusion)
    stage.sampler, stage.guidance = DDIM(5, spacing=Leading()), ClassifierFree(3.0)
    ours = stage.generate({"key": CAPTIONS, "text": CAPTIONS}, seed=0)
    x = SampleNoise(0, CAPTIONS).like(torch.empty(3, 4, 8, 8))
    ids = pipeline.tokenizer(
        ["", *CAPTIONS], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        tokens = pipeline.text_encoder(ids).last_hidden_state
    mask = torch.ones(3, tokens.shape[1])
    theirs = pipeline(
        None,
        negative_prompt=None,
        prompt_embeds=tokens[1:],
        prompt_attention_mask=mask,
        negative_prompt_embeds=tokens[:1].expand(3, -1, -1),
        negative_prompt_attention_mask=mask,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=x,
        height=16,
        width=16,
        use_resolution_binning=False,
        output_type="pt",
    ).images
    assert ((ours + 1) / 2 - theirs).abs().max() < 1e-4
    assert ours.std() > 0.1 and (ours[0] - ours[1]).abs().max() > 0.01
    again = read_transformer(Checkpoint.open(import_folder(folder, tmp_path / "again")))
    assert same(again, model, position_grid=4.0)


def test_a_pipeline_of_theirs_computes_the_same_here(tmp_path):
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(2, 12, 4, 8, 2, sample_size=8)
    for block in net.transformer_blocks[1:]:  # as their converted checkpoints are
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    diffusers.DiTPipeline(net, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "theirs")
    run = import_folder(tmp_path / "theirs", tmp_path / "ours")
    stage = load_stage(run, Diffusion)
    assert isinstance(stage.conditioner, ClassLabel) and stage.conditioner.num_classes == 1000
    assert torch.equal(stage.objective.schedule.alpha, schedule.Linear().alpha) and stage.image_size == 16
    x, t, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 999, 1000])
    with torch.no_grad():
        ours = stage.denoiser(x, t, Cond(vector=stage.conditioner.embedding(label)))
        assert relative(ours, net.eval()(x, t, class_labels=label).sample) < 1e-5
    again = opened(export_pipeline(run, tmp_path / "again")).transformer.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())


@pytest.fixture
def autoencoder(tmp_path):
    model = transformer()
    return write_autoencoder(model.autoencoder, of_factor(0.18215, 4), tmp_path / "vae", SOURCE)


def test_a_file_of_their_program_becomes_a_run_and_comes_back(tmp_path, autoencoder):
    model = transformer()
    weights = dit_keys.to_facebook(model.dit.weights, model.table, grid=4)
    torch.save(weights, tmp_path / "DiT-T-2.pt")
    run = import_dit(tmp_path / "DiT-T-2.pt", autoencoder, tmp_path / "run", heads=2)
    stage = load_stage(run, Diffusion)
    assert isinstance(stage.objective, LearnedVariance) and isinstance(stage.latents, AutoencoderLatents)
    assert stage.image_size == 16 and stage.conditioner.num_classes == CLASSES
    stage.sampler.num_steps = 3
    assert stage.generate({"key": KEYS, "label": LABELS}, seed=0).std() > 0
    again = read_weights(export_dit(run, tmp_path / "again.pt"))
    assert set(again) == set(weights) and all(
        torch.equal(value, again[name]) for name, value in weights.items()
    )


def test_a_checkpoint_of_their_training_gives_its_average(tmp_path, autoencoder):
    model = transformer()
    weights = dit_keys.to_facebook(model.dit.weights, model.table, grid=4)
    other = {name: value + 1 if name != "pos_embed" else value for name, value in weights.items()}
    torch.save(
        {"model": other, "ema": weights, "opt": {}, "args": Namespace(model="DiT")}, tmp_path / "0050000.pt"
    )
    for kind, expected in (("ema", weights), ("raw", other)):
        run = import_dit(tmp_path / "0050000.pt", autoencoder, tmp_path / kind, heads=2, weights=kind)
        table = load_stage(run, Diffusion).conditioner.embedding.weight
        assert torch.equal(table, expected[dit_keys.FACEBOOK_TABLE])


def test_a_vector_of_another_width_is_folded_into_the_classes(tmp_path):
    model = transformer(as_diffusers=True)
    run = write_transformer(model, tmp_path / "ours", SOURCE)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    torch.manual_seed(0)
    layer, table = torch.nn.Linear(7, HIDDEN), torch.randn(CLASSES + 1, 7)
    state["config"]["init_args"]["conditioner"]["init_args"]["width"] = 7
    state["state_dict"] |= {
        "conditioner.embedding.weight": table,
        "denoiser.vector_embedding.weight": layer.weight.detach(),
        "denoiser.vector_embedding.bias": layer.bias.detach(),
    }
    torch.save(state, run / "checkpoints" / "last.ckpt")
    folder = export_pipeline(run, tmp_path / "theirs")
    found = read_transformer(Checkpoint.open(import_folder(folder, tmp_path / "again"))).table
    torch.testing.assert_close(found, layer(table).detach())


REFUSED = [
    (
        {"rms_norm": True, "as_diffusers": True},
        r"options\.rms_norm is True, expected False: diffusers' DiTTr",
    ),
    ({"positions": "rotary", "as_diffusers": True}, r"options\.positions is rotary, expected sincos"),
    ({}, r"options\.as_diffusers is False, expected True: diffusers' DiTTransformer2DModel has no other"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_diffusers_lacks_is_refused_by_name(tmp_path, options, message):
    run = write_transformer(transformer(**options), tmp_path / "ours", SOURCE)
    with pytest.raises(ValueError, match=message):
        export_pipeline(run, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_layers_that_fuse_a_route_are_refused_by_name_and_a_route_without_is_not():
    widths = DenoiserDims(4, vector=24)
    for routing in (None, Routing(1, 1)):
        assert _arguments(DiT(widths, **SHAPE, routing=routing))["depth"] == SHAPE["depth"]
    with pytest.raises(ValueError, match=r"model\.denoiser\.routing is Sprint, whose layers other programs"):
        _arguments(DiT(widths, **SHAPE, routing=Sprint(1, 1)))


def test_what_cannot_be_read_or_written_is_said_in_a_line(tmp_path, autoencoder):
    model = transformer()
    file = tmp_path / "x.pt"
    torch.save(dit_keys.to_facebook(model.dit.weights, model.table, grid=4), file)
    with pytest.raises(ValueError, match=r"x\.pt: the width 24 is of no size of the paper: say --heads"):
        import_dit(file, autoencoder, tmp_path / "run")
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(
        ValueError, match=r"x\.pt: no weight pos_embed, expected those of a diffusion transformer"
    ):
        import_dit(file, autoencoder, tmp_path / "run")
    run = write_transformer(transformer(text=True), tmp_path / "ours", SOURCE)
    with pytest.raises(
        ValueError, match=r"options\.modulation is single, expected block: facebookresearch/DiT"
    ):
        export_dit(run, tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"--out: .*ends in '\.bin', expected a new file that ends in \.pt"):
        export_dit(run, tmp_path / "y.bin")
    folder = export_pipeline(run, tmp_path / "theirs")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="text_encoder is T5EncoderModel, expected CLIPTextModel"):
        import_folder(folder, tmp_path / "again")
