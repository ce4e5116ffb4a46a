"""CompVis's single files: diffusers' conversion agrees, each name has one counterpart, nothing is lost."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import AUTOENCODER, TEXT, randomised, relative, same, tiny

from ldm.diffusion import prediction, schedule
from ldm.interop.compvis import ImportOptions, _read_unet, export_file, import_file
from ldm.interop.compvis_autoencoder import read_autoencoder
from ldm.interop.compvis_keys import autoencoder_modules, below, dotted, names, unet_modules
from ldm.interop.compvis_shapes import autoencoder_arguments, unet_arguments
from ldm.interop.compvis_text import of_open_clip, read_text, to_open_clip, write_text_tower
from ldm.interop.diffusers import export_pipeline
from ldm.interop.latents import of_factor
from ldm.interop.model import Network
from ldm.interop.runs import read_run, write_run
from ldm.interop.schedules import named
from ldm.interop.transformers import text_config
from ldm.latents.space import AutoencoderLatents
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.clip import CLIPModel
from ldm.nets.text import TextTower
from ldm.nets.unet import UNet
from ldm.types import DenoiserDims

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
transformers = pytest.importorskip("transformers")

SOURCE = {"program": "a test", "name": "tiny"}
SD2 = {
    "unet": {"linear_projection": True, "num_heads": [1, 2, 4]},
    "text": {"quick_gelu": False, "pad_id": 0},
}
VISION = {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "head_width": 4}
MODELS = {
    "1.x": {"kind": prediction.Epsilon, "latents": of_factor(0.18215, 4)},
    "2.x": {**SD2, "latents": of_factor(0.18215, 4)},
    "ours": {"made_of": named(schedule.Cosine, num_steps=100)},
    "inpainting": {"spatial": 5},
    "one level without attention": {"unet": {"attention": [False, True, True], "layers_per_block": 1}},
}
DEFAULTS = ImportOptions()


@pytest.fixture(scope="module", params=MODELS)
def triple(request, tmp_path_factory):
    """A model, its run, and the single file of it."""
    folder = tmp_path_factory.mktemp("triple")
    run = write_run(model := tiny(**MODELS[request.param]), folder / "ours", SOURCE)
    return model, run, export_file(run, folder / "x.safetensors")


def test_export_and_import_change_no_bit(tmp_path, triple):
    model, _, file = triple
    run, guessed = import_file(file, tmp_path / "again", DEFAULTS)
    assert same(read_run(run), model) and guessed == []


@pytest.mark.parametrize("triple", ["1.x", "2.x", "ours"], indirect=True)
def test_diffusers_reads_a_single_file_as_its_folder(tmp_path, triple):
    _, run, file = triple
    folder = export_pipeline(run, tmp_path / "folder")
    read = {"local_files_only": True, "safety_checker": None}
    from_file = diffusers.StableDiffusionPipeline.from_single_file(str(file), config=str(folder), **read)
    from_folder = diffusers.StableDiffusionPipeline.from_pretrained(folder, **read)
    for part in ("unet", "vae", "text_encoder"):
        found, expected = (getattr(pipeline, part).state_dict() for pipeline in (from_file, from_folder))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), part


def shapes(net):
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [({}, 768), ({"num_heads": [5, 10, 20, 20], "linear_projection": True}, 1024)],
    ids=["1.x", "2.x"],
)
def test_published_models_have_686_and_248_names_each_with_one_counterpart(arguments, tokens):
    arguments = {"attention": [True] * 3 + [False], "layers_per_block": 2, **arguments}
    with torch.device("meta"):
        unet, autoencoder = UNet(DenoiserDims(4, tokens), **arguments), KLAutoencoder()
    theirs = names(shapes(unet), unet_modules(arguments))
    assert len(shapes(unet)) == len(theirs) == len(set(theirs.values())) == 686
    for ours, name in {
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "down_blocks.2.downsamplers.0.conv.bias": "input_blocks.9.0.op.bias",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.2.upsamplers.0.conv.weight": "output_blocks.8.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
    }.items():
        assert theirs[ours] == name
    found = {name: unet.state_dict()[ours] for ours, name in theirs.items()}
    assert all(dotted(name.replace(".", "")) == name for name in theirs.values())
    inferred = unet_arguments(found, "x")
    assert {key: inferred[key] for key in arguments} == arguments
    assert inferred["block_out_channels"] == [320, 640, 1280, 1280]
    assert inferred["num_heads"] == arguments.get("num_heads", 8)
    levels = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    theirs = names(shapes(autoencoder), autoencoder_modules(levels))
    assert len(shapes(autoencoder)) == len(theirs) == len(set(theirs.values())) == 248
    assert theirs["decoder.up_blocks.0.resnets.0.conv1.weight"] == "decoder.up.3.block.0.conv1.weight"
    assert theirs["encoder.mid_block.attentions.0.to_out.0.bias"] == "encoder.mid.attn_1.proj_out.bias"
    inferred = autoencoder_arguments({v: autoencoder.state_dict()[k] for k, v in theirs.items()}, "x")
    assert inferred == levels | {
        "latent_channels": 4,
        "norm_groups": 32,
        "image_channels": 3,
        "attention": None,
    }


SD1_TEXT = {"width": 768, "layers": 12, "heads": 12, "quick_gelu": True, "pad_id": 49407}
SD2_TEXT = {"width": 1024, "layers": 23, "heads": 16}
SD2_UNET = {"num_heads": [5, 10, 20, 20], "linear_projection": True}
LEVELS = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}


def full_size(more, text, spatial):
    """Our networks without memory, and a file of them with CompVis's names."""
    arguments = {"attention": [True] * 3 + [False], "layers_per_block": 2, **more}
    with torch.device("meta"):
        unet = UNet(DenoiserDims(4, text["width"], spatial=spatial), **arguments)
        autoencoder, tower = KLAutoencoder(), TextTower(**text)
        file = write_text_tower(Network(tower.config["init_args"], tower.state_dict()))
    for ours, theirs in names(shapes(unet), unet_modules(arguments)).items():
        file[f"model.diffusion_model.{theirs}"] = unet.state_dict()[ours]
    for ours, theirs in names(shapes(autoencoder), autoencoder_modules(LEVELS)).items():
        weight = autoencoder.state_dict()[ours]
        is_convolution = ".attn_1." in theirs and weight.ndim == 2
        file[f"first_stage_model.{theirs}"] = weight[:, :, None, None] if is_convolution else weight
    return (unet, autoencoder, tower), arguments, file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "text", "spatial"),
    [({}, SD1_TEXT, 0), ({}, SD1_TEXT, 5), (SD2_UNET, SD2_TEXT, 0)],
    ids=["1.5", "1.5 inpainting", "2.1"],
)
def test_files_of_full_size_have_the_layout_that_diffusers_converts_and_we_recognise(more, text, spatial):
    (unet, autoencoder, tower), arguments, file = full_size(more, text, spatial)
    blocks = {
        f"{way}_block_types": (f"{way.title()}{kind}Block2D",) * 4
        for way, kind in (("down", "Encoder"), ("up", "Decoder"))
    }
    with torch.device("meta"):
        their_unet = diffusers.UNet2DConditionModel(
            in_channels=4 + spatial, sample_size=64, cross_attention_dim=text["width"],
            attention_head_dim=more.get("num_heads", 8), use_linear_projection=bool(more),
        )  # fmt: skip
        their_vae = diffusers.AutoencoderKL(**LEVELS, **blocks)
        their_text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config(tower)))
        if more:
            converted = single_file.convert_open_clip_checkpoint(their_text, dict(file))
        else:
            converted = single_file.convert_ldm_clip_checkpoint(dict(file))
    converted.pop("text_model.embeddings.position_ids", None)  # of older transformers, as published files are
    found = {name.removeprefix("text_model."): tensor.shape for name, tensor in converted.items()}
    assert found == {name.removeprefix("text_model."): s for name, s in shapes(their_text).items()}
    for convert, model in (
        (single_file.convert_ldm_unet_checkpoint, their_unet),
        (single_file.convert_ldm_vae_checkpoint, their_vae),
    ):
        converted = convert(dict(file), model.config)
        assert {name: tensor.shape for name, tensor in converted.items()} == shapes(model)
    read, kind = _read_unet(file, None, DEFAULTS, "x")
    assert kind == "raw" and {key: read.arguments[key] for key in arguments} == arguments
    first_stage = below(file, "first_stage_model.")
    networks = (read, read_autoencoder(file, first_stage, {}, None, None, "x")[0], read_text(file, "x"))
    for network, ours in zip(networks, (unet, autoencoder, tower), strict=True):
        assert {name: tensor.shape for name, tensor in network.weights.items()} == shapes(ours)
    assert {key: networks[2].arguments[key] for key in text} == text


def averaged(name):
    """Name of an average in a file, by the name of what it averages without a prefix: it has no dots."""
    return "model_ema.diffusion_model" + name.replace(".", "")


def published(tmp_path, **more):
    """A file like published ones: without metadata, with the weights of 1.x in small.

    Its widths suit the defaults: 32 groups, 8 heads, heads of the text tower 64 wide.
    """
    text = {"width": 64, "heads": 1} | more.pop("text", {})
    unet = {"block_out_channels": [32, 64], "attention": [True, False], "num_heads": 8, "norm_groups": 32}
    model = tiny(unet=unet | more.pop("unet", {}), text=text, latents=of_factor(0.18215, 4), **more)
    autoencoder = {**AUTOENCODER, "block_out_channels": [32, 64], "norm_groups": 32}
    net = Network(autoencoder, randomised(KLAutoencoder(**autoencoder)).state_dict())
    model = type(model)(**{**vars(model), "autoencoder": net})
    tensors = load_file(export_file(write_run(model, tmp_path / "ours", SOURCE), tmp_path / "x.safetensors"))
    return model, tensors


@pytest.mark.parametrize("wrap", ["ckpt", "safetensors"])
def test_a_file_without_metadata_is_recognised(tmp_path, wrap):
    model, tensors = published(tmp_path, kind=prediction.Epsilon)
    file = tmp_path / f"bare.{wrap}"
    if wrap == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 470000}, file)
    else:
        save_file(tensors, file)
    run, guessed = import_file(file, tmp_path / "again", ImportOptions(image_size=16))
    found = read_run(run)
    assert same(found, model) and guessed == []
    assert read_run(import_file(file, tmp_path / "large", DEFAULTS)[0]).image_size == 512


def test_a_file_of_2_x_requires_the_prediction(tmp_path):
    unet = {"linear_projection": True, "num_heads": [1, 1]}
    model, tensors = published(tmp_path, unet=unet, text=SD2["text"])
    save_file(tensors, tmp_path / "bare.safetensors")
    run, guessed = import_file(tmp_path / "bare.safetensors", tmp_path / "a", DEFAULTS)
    assert len(guessed) == 1 and "--prediction velocity" in guessed[0]
    assert read_run(run).process.prediction["class_path"].endswith("Epsilon")
    options = ImportOptions(prediction="velocity", image_size=16)
    run, guessed = import_file(tmp_path / "bare.safetensors", tmp_path / "b", options)
    assert same(read_run(run), model) and guessed == []


@pytest.fixture(scope="module")
def velocity(tmp_path_factory):
    """A model and the tensors of its published file."""
    return published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def tensors(velocity):
    return velocity[1]


def test_averaged_weights_are_taken_unless_raw_ones_are_requested(tmp_path, velocity):
    model, tensors = velocity
    prefix = "model.diffusion_model."
    ema = {averaged(k.removeprefix(prefix)): v + 1 for k, v in tensors.items() if k.startswith(prefix)}
    file = tmp_path / "ema.ckpt"
    torch.save({"state_dict": {**tensors, **ema, "model_ema.decay": torch.tensor(0.9999)}}, file)
    raw = model.unet.weights["conv_in.weight"]
    for weights, expected in ((None, raw + 1), ("ema", raw + 1), ("raw", raw)):
        run, _ = import_file(file, tmp_path / f"out-{weights}", ImportOptions(weights))
        assert torch.equal(read_run(run).unet.weights["conv_in.weight"], expected)
    del ema[averaged("out.2.bias")]
    torch.save({"state_dict": {**tensors, **ema}}, file)
    with pytest.raises(ValueError, match=r"1 of \d+ weights missing \(out\.2\.bias\)"):
        import_file(file, tmp_path / "part", DEFAULTS)
    save_file(tensors, tmp_path / "raw.safetensors")
    with pytest.raises(ValueError, match=r"no averaged weights \(model_ema\..*\), expected --weights raw"):
        import_file(tmp_path / "raw.safetensors", tmp_path / "none", ImportOptions("ema"))


def test_a_file_of_averaged_weights_alone_is_taken(tmp_path, velocity):
    model, tensors = velocity
    prefix = "model.diffusion_model."
    ema = {averaged(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}
    rest = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    torch.save({"state_dict": {**rest, **ema, "model_ema.decay": torch.tensor(0.9999)}}, tmp_path / "x.ckpt")
    run, _ = import_file(tmp_path / "x.ckpt", tmp_path / "out", ImportOptions(image_size=16))
    found = read_run(run).unet
    assert found.arguments == model.unet.arguments
    assert all(torch.equal(found.weights[key], value) for key, value in model.unet.weights.items())
    with pytest.raises(ValueError, match=r"no weights but averaged ones .*, expected --weights ema"):
        import_file(tmp_path / "x.ckpt", tmp_path / "none", ImportOptions("raw"))


EMPTY = torch.empty(0)


@pytest.mark.parametrize(
    ("markers", "metadata", "kind", "is_zero_snr"),
    [
        ({"v_pred": EMPTY}, {}, "Velocity", False),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, "Velocity", True),
        ({}, {"modelspec.prediction_type": "v"}, "Velocity", False),
        ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "Velocity", True),
        ({}, {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"}, "Epsilon", False),
    ],
)
def test_the_prediction_and_schedule_stated_in_a_file_are_used(
    tmp_path, tensors, markers, metadata, kind, is_zero_snr
):
    save_file(
        {**tensors, **markers}, tmp_path / "x.safetensors", {**metadata, "modelspec.resolution": "96x96"}
    )
    run, notes = import_file(tmp_path / "x.safetensors", tmp_path / "out", DEFAULTS)
    found = read_run(run)
    assert found.process.prediction["class_path"] == f"ldm.diffusion.{kind}" and notes == []
    assert (found.process.schedule["class_path"] == "ldm.diffusion.ZeroTerminalSNR") == is_zero_snr
    spacing = found.process.sampler["init_args"]["spacing"]["class_path"]
    assert spacing.endswith("Trailing" if is_zero_snr else "Leading") and found.image_size == 96


@pytest.mark.parametrize(
    ("markers", "metadata", "options", "message"),
    [
        (
            {"v_pred": EMPTY},
            {},
            {"prediction": "epsilon"},
            "--prediction: got epsilon, but .* states another .marker v_pred says velocity.: leave it out",
        ),
        (
            {"v_pred": EMPTY},
            {"modelspec.prediction_type": "epsilon"},
            {},
            "contradicts itself .marker v_pred says velocity, modelspec.prediction_type says epsilon",
        ),
        ({}, {"modelspec.prediction_type": "x"}, {}, "modelspec.prediction_type is x, expected epsilon, "),
        (
            {"ztsnr": EMPTY},
            {},
            {"prediction": "epsilon"},
            "is epsilon with zero terminal SNR",
        ),
        ({}, {}, {"scaling_factor": 0.5}, "--scaling-factor: got 0.5, but .* has 0.18215: leave the option"),
    ],
)
def test_contradictions_are_one_line(tmp_path, tensors, markers, metadata, options, message):
    save_file({**tensors, **markers}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=message) as error:
        import_file(tmp_path / "x.safetensors", tmp_path / "out", ImportOptions(**options))
    assert "x.safetensors" in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_rounded_to_half_keeps_schedule_and_scale(tmp_path, tensors, dtype):
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(half, tmp_path / "x.safetensors")
    found = read_run(import_file(tmp_path / "x.safetensors", tmp_path / "out", DEFAULTS)[0])
    assert found.process.schedule["class_path"] == "ldm.diffusion.ScaledLinear"
    assert torch.equal(found.latents.std, of_factor(0.18215, 4).std)


def test_zero_snr_alone_means_velocity_and_an_option_decides_a_contradiction(tmp_path, tensors):
    save_file({**tensors, "ztsnr": EMPTY}, tmp_path / "x.safetensors")
    run, notes = import_file(tmp_path / "x.safetensors", tmp_path / "a", DEFAULTS)
    assert read_run(run).process.prediction["class_path"].endswith("Velocity")
    assert len(notes) == 1 and "zero terminal SNR" in notes[0]
    save_file(
        {**tensors, "v_pred": EMPTY}, tmp_path / "y.safetensors", {"modelspec.prediction_type": "epsilon"}
    )
    run, _ = import_file(tmp_path / "y.safetensors", tmp_path / "b", ImportOptions(prediction="epsilon"))
    assert read_run(run).process.prediction["class_path"].endswith("Epsilon")


LORA = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (LORA, "the file is a LoRA, which changes a model: merge it"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": EMPTY}, "the file is a LoRA"),
        ({"mid_block.attn2.processor.to_q_lora.up.weight": EMPTY}, "the file is a LoRA"),
        ({"down_blocks.0.resnets.0.conv1.weight": EMPTY}, "a part of a folder of diffusers"),
        ({"encoder.conv_in.weight": EMPTY, "quantize.embedding.weight": EMPTY}, "a VQ autoencoder"),
        ({"encoder.conv_in.weight": EMPTY, "bn.running_mean": EMPTY}, "FLUX.2's autoencoder"),
        ({"encoder.conv_in.weight": EMPTY, "encoder.down_blocks.0.x": EMPTY}, "a folder of diffusers"),
        ({"a": EMPTY}, "the file has no U-Net, expected model.diffusion_model.*, nor an autoencoder"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, found, message):
    save_file(found, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        import_file(tmp_path / "x.safetensors", tmp_path / "out", DEFAULTS)
    assert message in str(error.value) and "x.safetensors" in str(error.value) and len(str(error.value)) < 300


def test_an_extra_logit_scale_is_ignored_and_an_extra_lora_is_noted(tmp_path, tensors):
    extra = {"cond_stage_model.logit_scale": torch.tensor(4.6), **LORA}
    save_file(tensors | extra, tmp_path / "x.safetensors")
    _, notes = import_file(tmp_path / "x.safetensors", tmp_path / "out", DEFAULTS)
    assert len(notes) == 1 and notes[0].startswith("left out 1 weights of a LoRA (lora_unet_down")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_autoencoder_alone_becomes_its_own_run(tmp_path, tensors, prefix):
    alone = {f"{prefix}{k}": v for k, v in below(tensors, "first_stage_model.").items()}
    loss = {"loss.discriminator.main.0.weight": torch.zeros(2, 2), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": {**alone, **loss}, "epoch": 3}, tmp_path / "vae.ckpt")
    run, notes = import_file(tmp_path / "vae.ckpt", tmp_path / "a", DEFAULTS)
    assert run == tmp_path / "a" and len(notes) == 1 and "--scaling-factor" in notes[0]
    full = tmp_path / "full.safetensors"
    save_file(tensors, full)
    import_file(full, tmp_path / "b", DEFAULTS)
    ours, theirs = (AutoencoderLatents(str(tmp_path / name)) for name in ("a", "b/autoencoder"))
    assert torch.equal(ours.latent_std, theirs.latent_std)
    for name, weight in theirs.net.module.state_dict().items():
        assert torch.equal(ours.net.module.state_dict()[name], weight), name
    run, notes = import_file(tmp_path / "vae.ckpt", tmp_path / "c", ImportOptions(scaling_factor=0.5))
    assert notes == [] and AutoencoderLatents(str(run)).latent_std.eq(2).all()
    del alone[f"{prefix}quant_conv.weight"]
    torch.save(alone, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r"part\.ckpt: 1 of \d+ weights missing \(quant_conv\.weight\)"):
        import_file(tmp_path / "part.ckpt", tmp_path / "d", DEFAULTS)


def test_heads_may_be_given(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    run, _ = import_file(tmp_path / "x.safetensors", tmp_path / "again", ImportOptions(num_heads=4))
    assert read_run(run).unet.arguments["num_heads"] == 4


def test_a_tower_with_open_clips_names_is_open_clips():
    config = {"context_length": 9, "width": 16, "heads": 2, "layers": 3}
    torch.manual_seed(0)
    clip = randomised(CLIPModel(8, VISION, config))
    theirs = {k: v for k, v in clip.model.state_dict().items() if not k.startswith("visual.")}
    expected = clip.text_tower().clip_skip(1)
    found = of_open_clip(theirs)
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


def test_the_block_that_is_added_for_open_clip_changes_nothing():
    tower = randomised(TextTower(**TEXT | {"quick_gelu": False}))
    named_theirs = to_open_clip(Network(tower.config["init_args"], tower.state_dict()))
    config = {"context_length": TEXT["context_length"], "width": 16, "heads": 2, "layers": TEXT["layers"] + 1}
    clip = CLIPModel(16, VISION, config)
    missing, extra = clip.model.load_state_dict(named_theirs, strict=False)
    assert not extra and all(name.startswith(("visual.", "logit_scale")) for name in missing)
    ids = tower.tokenize(["a red ring", ""])
    with torch.no_grad():
        assert relative(clip.eval().text_tower()(ids), tower(ids)) < 1e-6


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (r"model\.diffusion_model\.", "the file has no U-Net, expected model.diffusion_model.*"),
        (r"first_stage_model\.", "the file has no autoencoder, expected first_stage_model.*"),
        (r"cond_stage_model\.", "the file has no text tower, expected cond_stage_model.transformer."),
        (r".*middle_block\.2\.in_layers\.2\.bias", "weights missing (middle_block.2.in_layers.2.bias)"),
        (r".*input_blocks\.0\.0\.weight", "weight input_blocks.0.0.weight is missing"),
        (r".*post_quant_conv\.weight", "weights missing (post_quant_conv.weight)"),
        (r".*encoder\.conv_out\.weight", "weight encoder.conv_out.weight is missing"),
        (r".*final_layer_norm\.weight", "weight final_layer_norm.weight is missing"),
    ],
)
def test_missing_weights_are_named(tensors, tmp_path, without, message):
    left = {name: tensor for name, tensor in tensors.items() if not re.match(without, name)}
    save_file(left, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        import_file(tmp_path / "x.safetensors", tmp_path / "out", DEFAULTS)
    assert message in str(error.value) and "x.safetensors" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "model.diffusion_model.label_emb.0.0.weight",
            "has class embeddings (label_emb.0.0.weight)",
        ),
        (
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.1.x",
            "has transformers of depth 2",
        ),
        ("model.diffusion_model.extra.weight", "1 weights not expected (extra.weight)"),
        ("first_stage_model.loss.logvar", "1 weights not expected (loss.logvar)"),
        ("cond_stage_model.transformer.text_model.extra", "1 weights not expected (extra)"),
    ],
)
def test_unexpected_weights_are_named(tensors, tmp_path, more, message):
    save_file(tensors | {more: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        import_file(tmp_path / "x.safetensors", tmp_path / "out", DEFAULTS)
    assert message in str(error.value)


def test_an_export_overwrites_nothing(tmp_path):
    run = write_run(tiny(), tmp_path / "ours", SOURCE)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.safetensors' is there already, expected a new file"):
        export_file(run, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.ckpt' ends in '\.ckpt', expected a new file"):
        export_file(run, tmp_path / "x.ckpt")


def test_an_autoencoder_without_the_convolutions_around_the_latent_gets_identities(tmp_path, tensors):
    alone = {k: v for k, v in below(tensors, "first_stage_model.").items() if "quant_conv" not in k}
    save_file(alone, tmp_path / "ae.safetensors")
    run, _ = import_file(tmp_path / "ae.safetensors", tmp_path / "ours", ImportOptions(scaling_factor=1.0))
    net, image = AutoencoderLatents(str(run)).net.module, torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        moments = net.encoder(image)
        assert torch.equal(net.encode(image).mean, moments[:, :4])
        assert torch.equal(net.decode(moments[:, :4]), net.decoder(moments[:, :4]))
