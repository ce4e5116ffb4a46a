"""CompVis's single files: diffusers' conversion agrees, each name has one counterpart, nothing is lost."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import AUTOENCODER, TEXT, randomised, relative, same, tiny

from ldm.diffusion import prediction, schedule
from ldm.interop.compvis import ImportOptions, _read_autoencoder, _read_unet, export_file, import_file
from ldm.interop.compvis_keys import autoencoder_modules, averaged, names, unet_modules
from ldm.interop.compvis_shapes import autoencoder_arguments, unet_arguments
from ldm.interop.compvis_text import of_open_clip, read_text, to_open_clip, write_text_tower
from ldm.interop.diffusers import export_pipeline
from ldm.interop.latents import of_factor
from ldm.interop.model import Network
from ldm.interop.runs import read_run, write_run
from ldm.interop.schedules import named
from ldm.interop.transformers import text_config
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


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_is_what_left_bit_for_bit(tmp_path, name):
    model = tiny(**MODELS[name])
    file = export_file(write_run(model, tmp_path / "ours", SOURCE), tmp_path / "x.safetensors")
    run, guessed = import_file(file, tmp_path / "again", DEFAULTS)
    assert same(read_run(run), model) and guessed == []


@pytest.mark.parametrize("name", ["1.x", "2.x", "ours"])
def test_diffusers_reads_a_single_file_as_its_folder(tmp_path, name):
    run = write_run(tiny(**MODELS[name]), tmp_path / "ours", SOURCE)
    folder, file = export_pipeline(run, tmp_path / "folder"), export_file(run, tmp_path / "x.safetensors")
    read = {"local_files_only": True, "safety_checker": None}
    single = diffusers.StableDiffusionPipeline.from_single_file(str(file), config=str(folder), **read)
    whole = diffusers.StableDiffusionPipeline.from_pretrained(folder, **read)
    for part in ("unet", "vae", "text_encoder"):
        found, expected = (getattr(pipeline, part).state_dict() for pipeline in (single, whole))
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
    assert inferred == levels | {"latent_channels": 4, "norm_groups": 32, "image_channels": 3}


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
    networks = (read, _read_autoencoder(file, None, "x")[0], read_text(file, "x"))
    for network, ours in zip(networks, (unet, autoencoder, tower), strict=True):
        assert {name: tensor.shape for name, tensor in network.weights.items()} == shapes(ours)
    assert {key: networks[2].arguments[key] for key in text} == text


def test_the_averages_names_have_no_dots():
    assert averaged("input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


def published(tmp_path, **more):
    """A file as published ones are: nothing in it says what it is, and the weights are those of 1.x in small.

    Its widths are what the defaults are right for: 32 groups, 8 heads, heads of the text tower 64 wide.
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
def test_a_file_that_says_nothing_of_itself_is_recognised(tmp_path, wrap):
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


def test_a_file_of_2_x_asks_what_it_predicts(tmp_path):
    unet = {"linear_projection": True, "num_heads": [1, 1]}
    model, tensors = published(tmp_path, unet=unet, text=SD2["text"])
    save_file(tensors, tmp_path / "bare.safetensors")
    run, guessed = import_file(tmp_path / "bare.safetensors", tmp_path / "a", DEFAULTS)
    assert len(guessed) == 1 and "--prediction velocity" in guessed[0]
    assert read_run(run).process.prediction["class_path"].endswith("Epsilon")
    options = ImportOptions(prediction="velocity", image_size=16)
    run, guessed = import_file(tmp_path / "bare.safetensors", tmp_path / "b", options)
    assert same(read_run(run), model) and guessed == []


def test_averaged_weights_are_taken_unless_raw_ones_are_asked_for(tmp_path):
    model, tensors = published(tmp_path)
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
    with pytest.raises(ValueError, match=r"no averaged weights \(model_ema\.\*\), expected --weights raw"):
        import_file(tmp_path / "raw.safetensors", tmp_path / "none", ImportOptions("ema"))


def test_heads_may_be_said(tmp_path):
    _, tensors = published(tmp_path)
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


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    return published(tmp_path_factory.mktemp("published"))[1]


@pytest.mark.parametrize(
    ("without", "says"),
    [
        (r"model\.diffusion_model\.", "the file has no U-Net, expected model.diffusion_model.*"),
        (r"first_stage_model\.", "the file has no autoencoder, expected first_stage_model.*"),
        (r"cond_stage_model\.", "the file has no text tower, expected cond_stage_model.transformer."),
        (r".*middle_block\.2\.in_layers\.2\.bias", "weights missing (middle_block.2.in_layers.2.bias)"),
        (r".*input_blocks\.0\.0\.weight", "weight input_blocks.0.0.weight is missing"),
        (r".*post_quant_conv\.weight", "weight post_quant_conv.weight is missing"),
        (r".*final_layer_norm\.weight", "weight final_layer_norm.weight is missing"),
    ],
)
def test_what_is_missing_is_said_by_name(tensors, tmp_path, without, says):
    left = {name: tensor for name, tensor in tensors.items() if not re.match(without, name)}
    save_file(left, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        import_file(tmp_path / "x.safetensors", tmp_path / "out", DEFAULTS)
    assert says in str(error.value) and "x.safetensors" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
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
def test_what_is_too_much_is_said_by_name(tensors, tmp_path, more, says):
    save_file(tensors | {more: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        import_file(tmp_path / "x.safetensors", tmp_path / "out", DEFAULTS)
    assert says in str(error.value)


def test_an_export_overwrites_nothing(tmp_path):
    run = write_run(tiny(), tmp_path / "ours", SOURCE)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.safetensors' is there already, expected a new file"):
        export_file(run, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.ckpt' ends in '\.ckpt', expected a new file"):
        export_file(run, tmp_path / "x.ckpt")
