"""Text towers against transformers' CLIPTextModel, import and export."""

import json

import pytest
import torch
from clip_tokens import text_tokens
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers import CLIPModel as TheirCLIP

from ldm.conditioners.text import CLIPText, load_tower
from ldm.interop.transformers import empty_tower, export_text, import_text, text_config
from ldm.io.checkpoint import Checkpoint, header
from ldm.nets.clip import CLIPModel
from ldm.nets.text import TextTower
from ldm.stages.load import build_stage

CAPTIONS = ["a cat", "", "one two three four five six seven eight nine ten", "Ünïcode, 3 digits & 'quotes'"]
SHAPE = {"width": 16, "layers": 2, "heads": 2, "context_length": 8}
VARIANTS = [
    {},
    {"quick_gelu": True, "pad_id": 49407},
    {"width": 24, "heads": 3, "layers": 3, "mlp_ratio": 1.75, "context_length": 19},
]


def random_tower(**arguments):
    torch.manual_seed(0)
    tower = TextTower(**SHAPE | arguments)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return tower


def save_tower(tower, path):
    state = {"stage": "text_tower", "config": tower.config, "state_dict": tower.state_dict()}
    torch.save({**header(), **state, "progress": {"steps": 0, "samples": 0}}, path)
    return str(path)


def their_config(**changes):
    config = {
        "vocab_size": 49408,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 9,
        "hidden_act": "quick_gelu",
    }
    return CLIPTextConfig(**config | changes)


def save_theirs(kind, config, folder):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("arguments", VARIANTS)
def test_transformers_reads_an_export_and_computes_our_tokens(arguments, tmp_path):
    tower = random_tower(**arguments)
    folder = export_text(save_tower(tower, tmp_path / "tower.ckpt"), tmp_path / "out")
    model, report = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert (model.config.eos_token_id, model.config.pad_token_id) == (49407, tower.pad_id)
    words = CLIPTokenizer.from_pretrained(folder)
    ids = words(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tower.tokenize(CAPTIONS))
    with torch.no_grad():
        assert relative(model(ids).last_hidden_state, tower.encode(CAPTIONS)) < 1e-5
        double = model.double()(ids)
    assert relative(double.last_hidden_state, tower.double().encode(CAPTIONS)) < 1e-10
    ends = (ids == 49407).int().argmax(1)
    assert torch.equal(double.pooler_output, double.last_hidden_state[torch.arange(4), ends])


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_we_read_their_folders_and_compute_their_tokens(kind, hidden_act, tmp_path):
    model = save_theirs(kind, their_config(hidden_act=hidden_act), tmp_path / "theirs")
    conditioner = CLIPText(str(import_text(tmp_path / "theirs", tmp_path / "run")))
    tower = conditioner.tower
    ids = tower.tokenize(CAPTIONS)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        assert relative(conditioner({"text": CAPTIONS}).tokens, expected) < 1e-5
        assert relative(tower.double()(ids), model.double()(ids).last_hidden_state) < 1e-10


def test_the_text_tower_of_a_full_clip_is_read(tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    config = CLIPConfig(text_config=their_config().to_dict(), vision_config=vision)
    model = save_theirs(TheirCLIP, config, tmp_path / "theirs")
    tower = load_tower(Checkpoint.open(import_text(tmp_path / "theirs", tmp_path / "run")))
    ids = tower.tokenize(CAPTIONS)
    with torch.no_grad():
        assert relative(tower(ids), model.text_model(ids).last_hidden_state) < 1e-5


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_old_and_new_names_pickles_and_half_precision_are_read(prefix, tmp_path):
    save_theirs(CLIPTextModel, their_config(), tmp_path)
    bare = load_file(tmp_path / "model.safetensors")
    bare = {k.removeprefix("text_model."): v.half() for k, v in bare.items()}
    renamed = {prefix + k: v for k, v in bare.items()}
    renamed[f"{prefix}embeddings.position_ids"] = torch.arange(9)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    found = load_tower(Checkpoint.open(import_text(tmp_path, tmp_path / "run"))).state_dict()
    assert {k: v.dtype for k, v in found.items()} == dict.fromkeys(bare, torch.float32)
    assert all(torch.equal(found[k], v.float()) for k, v in bare.items())


@pytest.mark.parametrize("arguments", VARIANTS)
def test_there_and_back_changes_no_bit(arguments, tmp_path):
    tower = random_tower(**arguments)
    folder = export_text(save_tower(tower, tmp_path / "tower.ckpt"), tmp_path / "out")
    again = load_tower(Checkpoint.open(import_text(folder, tmp_path / "run")))
    assert again.config == tower.config
    assert all(torch.equal(v, tower.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"width": 768, "layers": 12, "heads": 12, "quick_gelu": True, "pad_id": 49407}, 123_060_480),
        ({"width": 1024, "layers": 23, "heads": 16}, None),
    ],
    ids=["Stable Diffusion 1", "Stable Diffusion 2"],
)
def test_published_towers_have_their_names_and_shapes(arguments, size):
    with torch.device("meta"):
        ours = TextTower(**arguments)
        theirs = CLIPTextModel(CLIPTextConfig(**text_config(ours)))
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert size is None or sum(p.numel() for p in ours.parameters()) == size
    assert empty_tower(text_config(ours), ours.pad_id, "config.json").config == ours.config


def test_the_tower_that_a_denoiser_trained_is_what_is_exported(tmp_path):
    path = save_tower(random_tower(), tmp_path / "tower.ckpt")
    stage = build_stage(diffusion_config(path, frozen=False))
    with torch.no_grad():
        stage.conditioner.tower.final_layer_norm.bias.add_(1.0)
    state = {"state_dict": stage.state_dict(), "weights": "ema"}
    stage.on_save_checkpoint(state)
    torch.save(state, tmp_path / "diffusion.ckpt")
    folder = export_text(tmp_path / "diffusion.ckpt", tmp_path / "out")
    model = CLIPTextModel.from_pretrained(folder)
    assert torch.equal(model.final_layer_norm.bias, stage.conditioner.tower.final_layer_norm.bias)
    record = json.loads((folder / "ldm.json").read_text())
    assert record["sha256"] == Checkpoint.open(tmp_path / "diffusion.ckpt").sha256
    assert record["weights"] == "ema" and record["config"] == stage.config


def diffusion_config(checkpoint, frozen):
    unet = {
        "block_out_channels": [8],
        "layers_per_block": 1,
        "attention": [True],
        "num_heads": 2,
        "norm_groups": 4,
    }
    text = {
        "class_path": "ldm.conditioners.text.CLIPText",
        "init_args": {"checkpoint": checkpoint, "frozen": frozen},
    }
    return {
        "class_path": "ldm.stages.diffusion.Diffusion",
        "init_args": {
            "latents": {"class_path": "ldm.latents.space.Pixels"},
            "conditioner": text,
            "denoiser": {"class_path": "ldm.nets.unet.UNet", "init_args": unet},
        },
    }


def test_a_clip_stage_exports_its_text_half(tmp_path):
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    net = {
        "embed_dim": 16,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    }
    stage = build_stage(
        {
            "class_path": "ldm.stages.clip.CLIP",
            "init_args": {"net": {"class_path": "ldm.nets.clip.CLIPModel", "init_args": net}},
        }
    )
    state = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(state)
    torch.save(state, tmp_path / "clip.ckpt")
    model = CLIPTextModel.from_pretrained(export_text(tmp_path / "clip.ckpt", tmp_path / "out"))
    assert isinstance(stage.net, CLIPModel)
    with torch.no_grad():
        assert (
            relative(model(stage.net.tokenize(CAPTIONS)).last_hidden_state, text_tokens(stage.net, CAPTIONS))
            < 1e-5
        )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_act", "gelu_new", "gelu or quick_gelu"),
        ("vocab_size", 49410, "49408"),
        ("layer_norm_eps", 1e-6, "1e-05"),
        ("model_type", "bert", "clip_text_model"),
    ],
)
def test_other_models_are_refused_by_file_and_key(key, value, expected, tmp_path):
    save_theirs(CLIPTextModel, their_config(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key} is {value}, expected {expected}"):
        import_text(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_extra_and_misshapen_weights_are_refused(tmp_path):
    save_theirs(CLIPTextModel, their_config(), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "encoder.layers.1.mlp.fc1.bias"
    key = next(k for k in weights if k.endswith(name))
    for broken in (
        {k: v for k, v in weights.items() if k != key},
        weights | {"lora.weight": torch.zeros(1)},
        weights | {key: torch.zeros(3)},
    ):
        save_file(broken, file)
        with pytest.raises(ValueError, match=r"model\.safetensors.*(mlp\.fc1\.bias|lora\.weight)"):
            import_text(tmp_path, tmp_path / "run")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: found .*, expected model\.safetensors"):
        import_text(tmp_path, tmp_path / "run")


def test_a_run_is_not_overwritten(tmp_path):
    save_theirs(CLIPTextModel, their_config(), tmp_path)
    import_text(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match=r"already has checkpoints/last\.ckpt"):
        import_text(tmp_path, tmp_path / "run")


def test_padding_is_that_of_the_tokenizer_next_to_a_text_encoder(tmp_path):
    tower = random_tower()
    export_text(save_tower(tower, tmp_path / "tower.ckpt"), tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "text_encoder" / name).rename(tmp_path / "tokenizer" / name)
    assert load_tower(Checkpoint.open(import_text(tmp_path / "text_encoder", tmp_path / "run"))).pad_id == 0
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    assert (
        load_tower(Checkpoint.open(import_text(tmp_path / "text_encoder", tmp_path / "other"))).pad_id
        == 49407
    )
