"""Folders of diffusers: theirs compute the same here, ours draw the same there, nothing is lost between."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import CAPTIONS, PER_CHANNEL, SCALED, UNET, relative, same, tiny
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.conditioners.text import load_tower
from ldm.diffusion import prediction, schedule
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.samplers.ddim import DDIM
from ldm.interop.diffusers import export_pipeline, import_folder
from ldm.interop.diffusers_configs import unet_arguments, unet_config
from ldm.interop.diffusers_vae import UNFOLDED
from ldm.interop.latents import of_factor
from ldm.interop.runs import read_run, write_run
from ldm.interop.schedules import named
from ldm.interop.tokenizer import write_tokenizer
from ldm.io.checkpoint import Checkpoint
from ldm.latents.space import AutoencoderLatents
from ldm.nets.unet import UNet
from ldm.rng import SampleNoise
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage
from ldm.types import Cond, DenoiserDims

diffusers = pytest.importorskip("diffusers")

SOURCE = {"program": "a test", "name": "tiny"}
LINEAR = {"linear_projection": True, "num_heads": [1, 2, 4]}
SD2 = {"quick_gelu": False, "pad_id": 0, "width": 24, "heads": 3}
COSINE = named(schedule.Cosine, num_steps=100)
OTHER_COSINE = named(schedule.Betas, values=(1 - torch.linspace(0.999, 0.9, 50).double()).tolist())
MODELS = {
    "1.x": {"kind": prediction.Epsilon, "latents": of_factor(0.18215, 4)},
    "2.x": {"unet": LINEAR, "text": SD2, "latents": of_factor(0.18215, 4)},
    "ours": {"made_of": COSINE},
    "zero SNR": {"made_of": named(schedule.ZeroTerminalSNR, schedule=SCALED)},
    "betas": {"made_of": OTHER_COSINE, "kind": prediction.X0},
}


def pipeline_of(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model, its run, and the export of it."""
    folder = tmp_path_factory.mktemp("pair")
    run = write_run(model := tiny(**MODELS[request.param]), folder / "ours", SOURCE)
    return model, run, export_pipeline(run, folder / "theirs")


def test_export_and_import_change_no_bit(tmp_path, pair):
    model, _, folder = pair
    assert same(read_run(import_folder(folder, tmp_path / "again")), model)


def test_an_export_draws_the_same_images(pair):
    _, run, folder = pair
    pipeline = pipeline_of(folder)
    stage = load_stage(str(run), Diffusion)
    stage.sampler, stage.guidance = DDIM(5), ClassifierFree(3.0)
    ours = stage.generate({"key": CAPTIONS, "text": CAPTIONS}, seed=0)
    x = SampleNoise(0, CAPTIONS).like(torch.empty(3, 4, 8, 8))
    theirs = pipeline(CAPTIONS, num_inference_steps=5, guidance_scale=3.0, latents=x, output_type="pt").images
    assert ((ours + 1) / 2 - theirs).abs().max() < 1e-4, "a level of 255 is 40 times as much"
    assert ours.std() > 0.1 and (ours[0] - ours[1]).abs().max() > 0.01, "the images say something"


def test_an_inpainting_model_survives_export_and_import(tmp_path):
    model = tiny(spatial=5)
    run = write_run(model, tmp_path / "ours", SOURCE)
    folder = export_pipeline(run, tmp_path / "theirs")
    assert type(pipeline_of(folder)).__name__ == "StableDiffusionInpaintPipeline"
    assert same(read_run(import_folder(folder, tmp_path / "again")), model)


def theirs(folder, seed=0, **changes):
    """A random pipeline that diffusers itself makes and saves, as published ones are."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **{"cross_attention_dim": 16, "attention_head_dim": 2} | changes,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=9))
    write_tokenizer(folder / "words", 9, 49407)
    pipeline = diffusers.StableDiffusionPipeline(
        vae,
        text,
        CLIPTokenizer.from_pretrained(folder / "words"),
        unet,
        diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        None,
        None,
        requires_safety_checker=False,
    )
    return pipeline


@pytest.mark.parametrize(
    "changes", [{}, {"use_linear_projection": True, "attention_head_dim": [1, 4]}], ids=["1.x", "2.x"]
)
def test_a_pipeline_of_theirs_computes_the_same_here(tmp_path, changes):
    pipeline = theirs(tmp_path, **changes)
    pipeline.save_pretrained(tmp_path / "theirs")
    run = import_folder(tmp_path / "theirs", tmp_path / "ours")
    stage = load_stage(str(run), Diffusion)
    net = load_stage(str(tmp_path / "ours" / "autoencoder"), Autoencoder).net
    tower = load_tower(Checkpoint.open(tmp_path / "ours" / "text"))
    assert stage.image_size == 32
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([7, 900]), torch.randn(2, 9, 16)
    image, z = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    ids = pipeline.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        assert relative(stage.denoiser(x, t, Cond(tokens)), pipeline.unet(x, t, tokens).sample) < 1e-5
        assert relative(tower.encode(CAPTIONS), pipeline.text_encoder(ids).last_hidden_state) < 1e-5
        doubled = pipeline.vae.double().encode(image.double()).latent_dist
        ours = net.double().encode(image.double())
        assert relative(ours.mean, doubled.mean) < 1e-10 and relative(ours.log_var, doubled.logvar) < 1e-10
        assert relative(net.decode(z.double()), pipeline.vae.decode(z.double()).sample) < 1e-10
    scaled = stage.latents.encode({"image": image}, torch.zeros(2, 4, 8, 8))
    assert relative(scaled, 0.13025 * doubled.mean.float()) < 1e-5
    abar = stage.objective.schedule.alpha.square()
    assert relative(abar, pipeline.scheduler.alphas_cumprod.double()) < 1e-5


VAE = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
}
MEAN, STD = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"latent_channels": 4, "scaling_factor": 0.13025}, torch.zeros(4), torch.full((4,), 1 / 0.13025)),
        (
            {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
            | {"use_quant_conv": False, "use_post_quant_conv": False},
            torch.full((16,), 0.1159),
            torch.full((16,), 1 / 0.3611),
        ),
        (
            {"latent_channels": 16, "scaling_factor": 0.5}
            | {"latents_mean": MEAN.tolist(), "latents_std": STD.tolist()},
            MEAN,
            STD / 0.5,
        ),
    ],
    ids=["one factor", "shifted, without quant_conv", "per channel"],
)
def test_an_autoencoder_alone_becomes_a_run_that_later_stages_take(tmp_path, settings, mean, std):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**VAE, **settings).eval()
    vae.save_pretrained(tmp_path / "theirs")
    run = import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert run == tmp_path / "ours"
    latents, image = AutoencoderLatents(str(run)), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        theirs = vae.encode(image).latent_dist.mean
        scaled = (theirs - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        ours = latents.encode({"image": image}, torch.zeros_like(theirs))
        assert relative(ours, scaled) < 1e-5
        assert relative(latents.decode(ours), vae.decode(theirs).sample.clamp(-1, 1)) < 1e-5
    assert Checkpoint.open(run).state["source"]["program"] == "diffusers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "VQModel"}, "_class_name is VQModel, expected AutoencoderKL"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False, expected True"),
        ({"latents_mean": [0.0]}, "expected 4 numbers in latents_mean and latents_std"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv is False, expected True"),
        ({"in_channels": 4}, "out_channels is 3, expected 4"),
        ({"norm_num_groups": 4, "latent_channels": 8}, "weights of another shape"),
    ],
)
def test_an_autoencoder_that_ours_cannot_be_is_refused_by_field(tmp_path, change, message):
    diffusers.AutoencoderKL(**VAE).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as error:
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert message in str(error.value) and str(file.parent) in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_the_autoencoder_of_another_pipeline_is_pointed_at(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "x")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"is FluxPipeline, expected .*; its autoencoder alone is in .*vae"):
        import_folder(folder, tmp_path / "out")


def test_the_scheduler_is_believed(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "x")
    file = folder / "scheduler" / "scheduler_config.json"
    message = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | message))
    process = read_run(import_folder(folder, tmp_path / "ours")).process
    assert process.prediction["class_path"] == "ldm.diffusion.Velocity"
    assert process.schedule["class_path"] == "ldm.diffusion.ZeroTerminalSNR"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match=r"scheduler_config\.json: prediction_type is epsilon with zero"):
        import_folder(folder, tmp_path / "none")


def test_weights_in_pieces_halves_pickles_and_under_old_names(tmp_path):
    pipeline = theirs(tmp_path)
    pipeline.save_pretrained(tmp_path / "whole")
    expected = read_run(import_folder(tmp_path / "whole", tmp_path / "a"))
    pipeline.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert len(list((tmp_path / "pieces" / "unet").glob("*.safetensors"))) > 3
    assert same(read_run(import_folder(tmp_path / "pieces", tmp_path / "b")), expected)
    pipeline.save_pretrained(tmp_path / "pickles", safe_serialization=False)
    assert list((tmp_path / "pickles" / "unet").glob("*.bin"))
    rename_attention(tmp_path / "pickles" / "vae" / "diffusion_pytorch_model.bin")
    file = tmp_path / "pickles" / "text_encoder" / "model.safetensors"  # as transformers 4 pickled it
    weights = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    torch.save({f"text_model.{k}": v for k, v in weights.items()}, file.with_name("pytorch_model.bin"))
    file.unlink()
    assert same(read_run(import_folder(tmp_path / "pickles", tmp_path / "c")), expected)


def rename_attention(file):
    weights, new = (
        torch.load(file),
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
    )
    for name in [name for name in weights if ".attentions." in name and "group_norm" not in name]:
        tensor = weights.pop(name)
        for now, before in new.items():
            name = name.replace(f".{now}.", f".{before}.")
        weights[name] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    torch.save(weights, file)


def test_half_weights_become_float32_and_variants_are_chosen(tmp_path):
    theirs(tmp_path, seed=0).save_pretrained(tmp_path / "x")
    theirs(tmp_path, seed=1).to(torch.float16).save_pretrained(tmp_path / "x", variant="fp16")
    plain = read_run(import_folder(tmp_path / "x", tmp_path / "a"))
    half = read_run(import_folder(tmp_path / "x", tmp_path / "b", variant="fp16"))
    name = "conv_in.weight"
    assert not torch.equal(plain.unet.weights[name], half.unet.weights[name])
    for network in (half.unet, half.autoencoder, half.text):
        for tensor in network.weights.values():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, tensor.half().float())
    for file in (tmp_path / "x").rglob("*model.safetensors"):
        file.unlink()
    assert same(read_run(import_folder(tmp_path / "x", tmp_path / "c")), half)
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model\.ema\.safetensors"):
        import_folder(tmp_path / "x", tmp_path / "d", variant="ema")


def test_weights_changed_after_an_export_are_taken_as_they_are(tmp_path):
    folder = export_pipeline(write_run(tiny(), tmp_path / "ours", SOURCE), tmp_path / "theirs")
    assert (folder / "vae" / UNFOLDED).is_file()
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["quant_conv.bias"] += 1
    save_file(weights, file)
    found = read_run(import_folder(folder, tmp_path / "again"))
    assert torch.equal(found.autoencoder.weights["quant_conv.bias"], weights["quant_conv.bias"])
    assert found.latents.mean.eq(0).all() and found.latents.std.eq(1).all()
    assert not torch.equal(found.latents.std, PER_CHANNEL.std)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return export_pipeline(write_run(tiny(), folder / "ours", SOURCE), folder / "theirs")


def test_an_export_names_its_source(exported):
    message = json.loads((exported / "ldm.json").read_text())
    assert message["stage"] == "diffusion" and len(message["sha256"]) == 64 and len(message["upstream"]) == 2
    assert message["config"]["init_args"]["denoiser"]["init_args"] == UNET


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (
            "unet",
            "transformer_layers_per_block",
            [1, 2, 10],
            "transformer_layers_per_block is [1, 2, 10], expected 1",
        ),
        ("unet", "addition_embed_type", "text_time", "addition_embed_type is text_time, expected None"),
        ("unet", "class_embed_type", "projection", "class_embed_type is projection, expected None"),
        ("unet", "dual_cross_attention", True, "dual_cross_attention is True, expected False"),
        (
            "unet",
            "down_block_types",
            ["AttnDownBlock2D"] * 3,
            "down_block_types has AttnDownBlock2D, expected",
        ),
        (
            "unet",
            "up_block_types",
            ["UpBlock2D"] * 3,
            "up_block_types is ['UpBlock2D', 'UpBlock2D', 'UpBlock2D']",
        ),
        ("unet", "layers_per_block", [1, 2, 2], "layers_per_block is [1, 2, 2], expected the same for all"),
        ("unet", "brand_new_thing", 3, "brand_new_thing is 3, expected no such field"),
        ("unet", "_class_name", "UNet1DModel", "_class_name is UNet1DModel, expected UNet2DConditionModel"),
        ("unet", "block_out_channels", [8, 16, 20], "of another shape"),
        ("unet", "layers_per_block", 1, "weights not expected"),
        ("unet", "layers_per_block", 3, "weights missing"),
        ("vae", "shift_factor", 0.1, "shift_factor is 0.1, expected None"),
        ("vae", "latent_channels", 16, "weights of another shape"),
        ("text_encoder", "hidden_act", "relu", "hidden_act is relu, expected gelu or quick_gelu"),
        ("scheduler", "beta_schedule", "sigmoid", "beta_schedule is sigmoid, expected scaled_linear or"),
        (
            "scheduler",
            "prediction_type",
            "flow_prediction",
            "prediction_type is flow_prediction, expected epsilon",
        ),
        (".", "_class_name", "StableDiffusionXLPipeline", "expected StableDiffusionPipeline or"),
    ],
)
def test_unsupported_fields_are_named_with_their_values(exported, tmp_path, part, field, value, message):
    folder = shutil.copytree(exported, tmp_path / "x")
    name = {"scheduler": "scheduler_config.json", ".": "model_index.json"}.get(part, "config.json")
    config = json.loads((folder / part / name).read_text())
    (folder / part / name).write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError) as error:
        import_folder(folder, tmp_path / "out")
    assert message in str(error.value) and str(folder) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_bad_input(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' is no folder"):
        import_folder(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json' does not exist, nor a config\.json"):
        import_folder(exported / "tokenizer", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"ldm\.json' is no folder, .*; from-compvis reads single"):
        import_folder(exported / "ldm.json", tmp_path / "out")
    with pytest.raises(ValueError, match=r"_class_name is UNet2DConditionModel, expected AutoencoderKL"):
        import_folder(exported / "unet", tmp_path / "out")
    with pytest.raises(ValueError, match=r"--out: .*theirs' is there already, expected an empty folder"):
        export_pipeline(exported.parent / "ours" / "diffusion", exported)
    with pytest.raises(ValueError, match=r"--out: .*last\.ckpt' is there already"):
        import_folder(exported, exported.parent / "ours")
    folder = shutil.copytree(exported, tmp_path / "x")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"unet' has no weights: found config\.json, expected diffusion_"
    ):
        import_folder(folder, tmp_path / "out")
    index = {"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (folder / "unet" / f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected one in its own folder"):
        import_folder(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "tokens", "spatial"),
    [
        ({}, 768, 0),
        ({"in_channels": 9}, 768, 5),
        (
            {
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            },
            1024,
            0,
        ),
    ],
    ids=["1.x", "1.x inpainting", "2.x"],
)
def test_published_unets_have_our_686_names_and_shapes(config, tokens, spatial):
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**{"sample_size": 64, "cross_attention_dim": 768} | config)
        ours = UNet(
            DenoiserDims(4, tokens, spatial=spatial), **(arguments := unet_arguments(dict(model.config), "x"))
        )
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert len(shapes) == 686
    written = unet_config(arguments, 4, 4 + spatial, tokens)
    theirs = {name: list(v) if isinstance(v, tuple) else v for name, v in model.config.items()}
    assert {name: theirs[name] for name in written if name != "_class_name"} == {
        name: value for name, value in written.items() if name != "_class_name"
    }
