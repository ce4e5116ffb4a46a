"""Published autoencoders alone, in and out: diffusers computes the same, and nothing is lost between."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import PER_CHANNEL, randomised, relative

from ldm.interop.checkpoints import write_checkpoint
from ldm.interop.compvis import ImportOptions, export_file, import_file
from ldm.interop.compvis_autoencoder import find_autoencoder, read_autoencoder
from ldm.interop.diffusers import export_pipeline, import_folder
from ldm.interop.diffusers_configs import vae_arguments, vae_config
from ldm.interop.latents import of_factor
from ldm.interop.model import Latents, Network
from ldm.interop.runs import read_autoencoder_run, write_autoencoder
from ldm.io.checkpoint import Checkpoint
from ldm.latents.space import AutoencoderLatents
from ldm.nets.autoencoder import KLAutoencoder
from ldm.types import ImageKind

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

SOURCE = {"program": "a test", "name": "tiny"}
WITHOUT = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}
PLAYGROUND = {
    "scaling_factor": 0.5,
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
}
PUBLISHED = {
    "SD": {"scaling_factor": 0.18215},
    "SDXL": {"scaling_factor": 0.13025, "force_upcast": True},
    "SD3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, **WITHOUT},
    "FLUX": {"scaling_factor": 0.3611, "shift_factor": 0.1159, **WITHOUT},
    "Playground": PLAYGROUND,
    "grey": {"scaling_factor": 0.5, "in_channels": 1, "out_channels": 1},
    "four channels": {"scaling_factor": 0.5, "in_channels": 4, "out_channels": 4},
}
"""What their config.json say beside the graph."""
ATTENDS = {"attention": [False, True]}
STATED = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def blocks(attention):
    kinds = {"down": [f"{'Attn' * a}DownEncoderBlock2D" for a in attention]}
    return {
        "down_block_types": tuple(kinds["down"]),
        "up_block_types": tuple(f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attention)),
    }


TINY = {"block_out_channels": (4, 8), "norm_num_groups": 2, **blocks([False, False])}


def statistics(settings):
    """What latents are shifted and divided by, as diffusers' pipelines do it."""
    channels, factor = settings.get("latent_channels", 4), settings["scaling_factor"]
    mean = settings.get("latents_mean", [settings.get("shift_factor", 0.0)] * channels)
    std = settings.get("latents_std", [1.0] * channels)
    return (torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1) / factor)


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """An autoencoder of diffusers, its folder, and our run of it."""
    folder, settings = tmp_path_factory.mktemp("published"), PUBLISHED[request.param]
    torch.manual_seed(0)
    vae = randomised(diffusers.AutoencoderKL(**TINY, **settings))
    vae.save_pretrained(folder / "theirs")
    return vae, settings, import_folder(folder / "theirs", folder / "ours")


def state(run):
    return Checkpoint.open(run).state["state_dict"]


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_published_autoencoder_computes_the_same_here(published):
    vae, settings, run = published
    latents, channels = AutoencoderLatents(str(run)), settings.get("in_channels", 3)
    image = torch.rand(2, channels, 8, 8) * 2 - 1
    assert latents.image_kind == ImageKind(channels)
    mean, std = statistics(settings)
    with torch.no_grad():
        theirs = vae.encode(image).latent_dist.mean
        ours = latents.encode({"image": image}, torch.zeros_like(theirs))
        assert relative(ours, (theirs - mean) / std) < 1e-5
        assert relative(latents.decode(ours), vae.decode(theirs).sample.clamp(-1, 1)) < 1e-5


def test_it_leaves_as_the_folder_that_it_came_as(published, tmp_path):
    vae, settings, run = published
    folder = export_pipeline(run, tmp_path / "folder")
    again = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)
    equal(again.state_dict(), vae.state_dict())
    if "latents_mean" not in settings:
        assert {name: again.config[name] for name in STATED} == {n: settings.get(n) for n in STATED}
    found, expected = (
        statistics({k: v for k, v in c.items() if v is not None}) for c in (again.config, settings)
    )
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found, expected, strict=True))
    assert again.config["force_upcast"] is True
    equal(state(import_folder(folder, tmp_path / "again")), state(run))
    assert json.loads((folder / "ldm.json").read_text())["stage"] == "autoencoder"


def test_it_leaves_as_a_single_file_that_diffusers_reads(published, tmp_path):
    vae, _, run = published
    folder = export_pipeline(run, tmp_path / "folder")
    file = export_file(run, tmp_path / "vae.safetensors")
    equal(single_file.convert_ldm_vae_checkpoint(load_file(file), vae.config), vae.state_dict())
    read = diffusers.AutoencoderKL.from_single_file(str(file), config=str(folder), local_files_only=True)
    equal(read.state_dict(), vae.state_dict())
    back, notes = import_file(file, tmp_path / "again", ImportOptions())
    assert notes == []
    equal(state(back), state(run))


def test_attention_in_levels_goes_both_ways(tmp_path):
    vae = randomised(diffusers.AutoencoderKL(**TINY | blocks([False, True]), layers_per_block=2))
    vae.save_pretrained(tmp_path / "theirs")
    run = import_folder(tmp_path / "theirs", tmp_path / "ours")
    net, image = Checkpoint.open(run).load_net(KLAutoencoder).eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        z = vae.encode(image).latent_dist.mean
        assert relative(net.encode(image).mean, z) < 1e-5
        assert relative(net.decode(z), vae.decode(z).sample) < 1e-5
    folder = export_pipeline(run, tmp_path / "folder")
    equal(diffusers.AutoencoderKL.from_pretrained(folder).state_dict(), vae.state_dict())
    file = export_file(run, tmp_path / "vae.safetensors")
    assert load_file(file)["decoder.up.1.attn.2.proj_out.weight"].shape == (8, 8, 1, 1)
    equal(state(import_file(file, tmp_path / "again", ImportOptions())[0]), state(run))


def trained(out, latents, image_size=32, channels=4, **more):
    """A run folder as training leaves it."""
    arguments = {"latent_channels": channels, "block_out_channels": [32, 32], "layers_per_block": 1, **more}
    net = randomised(KLAutoencoder(**arguments))
    complete = {"norm_groups": 32, "image_channels": 3, "attention": None, **arguments}
    return write_autoencoder(Network(complete, net.state_dict()), latents, out, SOURCE, image_size)


def test_an_autoencoder_of_patches_stays(tmp_path):
    run = trained(tmp_path / "run", PER_CHANNEL, patch_size=2)
    with pytest.raises(ValueError, match=r"cannot be exported: net\.patch_size is 2, expected 1"):
        export_pipeline(run, tmp_path / "folder")


def test_a_trained_autoencoder_leaves_with_the_statistics_of_each_channel(tmp_path):
    run = trained(tmp_path / "run", PER_CHANNEL)
    folder = export_pipeline(run, tmp_path / "folder")
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    assert vae.config["latents_mean"] == PER_CHANNEL.mean.tolist() and vae.config["scaling_factor"] == 1.0
    assert vae.config["sample_size"] == 32
    file = export_file(run, tmp_path / "vae.safetensors")
    for back in (
        import_folder(folder, tmp_path / "a"),
        import_file(file, tmp_path / "b", ImportOptions())[0],
    ):
        equal(state(back), state(run))
        assert Checkpoint.open(back).state["image_size"] == 32
        assert read_autoencoder_run(Checkpoint.open(back))[0].arguments["block_out_channels"] == [32, 32]


@pytest.mark.parametrize(("stated", "channels"), [(None, 3), (1, 1), (4, 4)])
def test_it_leaves_with_the_channels_of_its_images_also_where_none_are_stated(stated, channels):
    arguments = {"latent_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_groups": 4}
    config = vae_config({**arguments, "image_channels": stated}, of_factor(0.5, 4))
    assert (config["in_channels"], config["out_channels"]) == (channels, channels)
    assert vae_arguments(config, "x")[0]["image_channels"] == channels


def test_one_whose_scale_was_not_measured_stays(tmp_path):
    run = trained(tmp_path / "run", Latents(torch.zeros(4), torch.full((4,), float("nan"))))
    for out, export in ((tmp_path / "x", export_pipeline), (tmp_path / "x.safetensors", export_file)):
        with pytest.raises(ValueError, match="has no measured latent scale"):
            export(run, out)
        assert not out.exists()


def test_stages_that_do_not_leave_are_named(tmp_path):
    run = write_checkpoint(tmp_path / "run", "clip", {"class_path": "x"}, {}, SOURCE)
    for out, export in ((tmp_path / "x", export_pipeline), (tmp_path / "x.safetensors", export_file)):
        with pytest.raises(ValueError, match="of stage 'clip', expected stage 'diffusion' or 'autoencoder'"):
            export(run, out)


X = torch.zeros(1)
CASES = {
    "XL": ("first_stage_model.", {"conditioner.embedders.0.x": X}, {}, 4, (0.13025, 0.0)),
    "3": ("first_stage_model.", {"model.diffusion_model.joint_blocks.0.x": X}, {}, 16, (1.5305, 0.0609)),
    "FLUX": ("vae.", {"model.diffusion_model.double_blocks.0.x": X}, {}, 16, (0.3611, 0.1159)),
    "metadata": ("", {}, {"modelspec.architecture": "Flux.1-AE"}, 16, (0.3611, 0.1159)),
    "metadata XL": ("", {}, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, 4, (0.13025, 0.0)),
    "trained in CompVis's": ("", {"loss.logvar": X}, {}, 4, (0.18215, 0.0)),
}


def file_of(tmp_path, prefix, beside, metadata, channels):
    """A file as published ones are: it says nothing of its graph."""
    run = trained(tmp_path / "run", of_factor(1.0, channels), channels=channels)
    ours = load_file(export_file(run, tmp_path / "ours.safetensors"))
    weights = {f"{prefix}{name}": tensor for name, tensor in ours.items()} | beside
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "x.safetensors", metadata
    )
    return run, tmp_path / "x.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_the_scale_is_that_of_the_family_that_the_file_is_of(tmp_path, case):
    prefix, beside, metadata, channels, (factor, shift) = CASES[case]
    run, file = file_of(tmp_path, prefix, beside, metadata, channels)
    back, notes = import_file(file, tmp_path / "back", ImportOptions(only="autoencoder"))
    found, expected = state(back), state(run)
    assert torch.equal(found["latent_std"], of_factor(factor, channels).std)
    assert torch.equal(found["latent_mean"], torch.full((channels,), shift))
    equal(
        {k: v for k, v in found.items() if k[:3] == "net"},
        {k: v for k, v in expected.items() if k[:3] == "net"},
    )
    assert len(notes) == (case == "trained in CompVis's")
    given = ImportOptions(only="autoencoder", scaling_factor=0.5, shift_factor=0.25)
    found = state(import_file(file, tmp_path / "given", given)[0])
    assert found["latent_std"].eq(2).all() and found["latent_mean"].eq(0.25).all()


def test_statistics_of_channels_in_a_file_are_believed(tmp_path):
    edm = {
        "edm_mean": torch.tensor(PLAYGROUND["latents_mean"]),
        "edm_std": torch.tensor(PLAYGROUND["latents_std"]),
    }
    shaped = {name: value.view(1, 4, 1, 1) for name, value in edm.items()}
    _, file = file_of(tmp_path, "first_stage_model.", {**shaped, "conditioner.embedders.0.x": X}, {}, 4)
    found = state(import_file(file, tmp_path / "back", ImportOptions(only="autoencoder"))[0])
    mean, std = statistics(PLAYGROUND)
    assert torch.equal(found["latent_mean"], mean.flatten())
    assert torch.allclose(found["latent_std"], std.flatten(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"--shift-factor: got 0\.1, but .* has edm_mean and edm_std"):
        import_file(file, tmp_path / "no", ImportOptions(only="autoencoder", shift_factor=0.1))


def test_sixteen_channels_need_their_scale(tmp_path):
    _, file = file_of(tmp_path, "", {}, {}, 16)
    with pytest.raises(
        ValueError, match=r"no scale of its 16 latent channels: say --scaling-factor and --shift"
    ):
        import_file(file, tmp_path / "back", ImportOptions())
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("key", "says"), [("conditioner.embedders.0.x", "Stable Diffusion XL"),
    ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
    ("model.diffusion_model.double_blocks.0.x", "FLUX")])  # fmt: skip
def test_a_model_of_another_family_is_named_with_the_way_to_its_autoencoder(tmp_path, key, says):
    _, file = file_of(tmp_path, "first_stage_model.", {"model.diffusion_model.x": X, key: X}, {}, 4)
    with pytest.raises(ValueError) as error:
        import_file(file, tmp_path / "out", ImportOptions())
    assert f"the file is {says} ({key})" in str(error.value) and "--only autoencoder" in str(error.value)


LEVELS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, **blocks([False] * 4)}
FULL = {name: {**LEVELS, **settings} for name, settings in PUBLISHED.items()}


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_at_full_size(name):
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**FULL[name])
    arguments, latents = vae_arguments(dict(vae.config), "x")
    with torch.device("meta"):
        net = KLAutoencoder(**arguments)
    shapes = {key: tensor.shape for key, tensor in vae.state_dict().items()}
    ours = {key: tensor.shape for key, tensor in net.state_dict().items()}
    has_quant_conv = vae.config["use_quant_conv"]
    assert {k: v for k, v in ours.items() if has_quant_conv or "quant_conv" not in k} == shapes
    assert len(shapes) == (248 if has_quant_conv else 244)
    written, theirs = vae_config(arguments, latents, has_quant_conv), dict(vae.config)
    again = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    left = [] if "latents_mean" not in FULL[name] else ["scaling_factor", "latents_std", "latents_mean"]
    assert {k: v for k, v in written.items() if k not in ["_class_name", *left]} == {
        k: again[k] for k in written if k not in ["_class_name", *left]
    }
    assert_layout_of_compvis(net, vae, has_quant_conv)


def assert_layout_of_compvis(net, vae, has_quant_conv):
    from ldm.interop.compvis_autoencoder import _theirs

    weights = {k: v for k, v in net.state_dict().items() if has_quant_conv or "quant_conv" not in k}
    file = _theirs(weights, {"block_out_channels": [1] * 4, "layers_per_block": 2}, "first_stage_model.")
    converted = single_file.convert_ldm_vae_checkpoint(dict(file), vae.config)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in vae.state_dict().items()}
    found = find_autoencoder(file, "x")
    network = read_autoencoder(file, found, {}, 0.5, None, "x")[0]
    assert network.arguments["latent_channels"] == net.latent_channels
