"""ldm.sample: the same images whatever else is drawn with them, and files that say how they were made."""

import subprocess
import sys

import pytest
import torch
from comparing import error_of
from jsonargparse import Namespace
from PIL import Image
from tiny_runs import ROOT
from torchvision.transforms.functional import pil_to_tensor

from ldm import fit, sample
from ldm.compiler import InferenceCompiler
from ldm.data.buckets import Size
from ldm.io.checkpoint import Checkpoint
from ldm.io.images import from_bytes, read_text, to_bytes
from ldm.sample import redraw
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.load import load_stage


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A class-conditional model in pixel space."""
    pytest.importorskip("sklearn")
    from data.digits import pack_digits

    folder = tmp_path_factory.mktemp("digits")
    pack_digits(folder / "shards")
    arguments = [
        f"--config={ROOT}/configs/demo/digits.yaml",
        f"--run={folder / 'run'}",
        "--wandb.mode=disabled",
    ]
    data = [f"--data.{split}={folder / 'shards' / split}-000000.tar" for split in ("train", "val")]
    quick = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    small = ["--data.batch_size=8", "--model.sampler.num_steps=2", "--trainer.accelerator=cpu"]
    assert fit.main([*arguments, *data, *quick, *small]) == 0
    return folder / "run"


def draw(run, out, *more):
    assert sample.main([f"--checkpoint={run}", f"--out={out}", "--device=cpu", "--steps=3", *more]) == 0
    paths = sorted(out.glob("0*.png"))
    return torch.stack([pil_to_tensor(Image.open(path)) for path in paths]).int()


def test_an_image_depends_on_prompt_copy_and_seed_alone(chain, tmp_path):
    run, two = chain.runs / "diffusion", ["--prompt=a red ring", "--prompt=a blue square"]
    images = draw(run, tmp_path / "a", *two, "--num-per-prompt=2")
    one_by_one = draw(run, tmp_path / "b", *two[::-1], "--num-per-prompt=2", "--batch-size=1")
    assert images.shape == (4, 3, 32, 32)
    # equal numbers, but sums over other shapes round differently: one level of 255 at most
    assert (images - one_by_one[[2, 3, 0, 1]]).abs().max() <= 1
    repeated = draw(run, tmp_path / "c", two[0], two[0], "--num-per-prompt=1")
    assert (repeated - images[:2]).abs().max() <= 1
    assert (images[0] - images[1]).abs().max() > 10
    other_seed = draw(run, tmp_path / "d", *two, "--seed=1", "--num-per-prompt=2")
    assert (images - other_seed).flatten(1).abs().max(1).values.min() > 10


def test_compiled_blocks_draw_the_same(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(InferenceCompiler, "backend", "eager")  # torch's own kernels
    prompts = [f"--prompt=a {colour} ring" for colour in ("red", "blue", "green")]
    plain, compiled = (
        draw(chain.runs / "diffusion", tmp_path / choice, *prompts, "--batch-size=2", f"--compile={choice}")
        for choice in ("off", "on")
    )
    assert "--compile: the first batch takes a minute" in capsys.readouterr().err
    assert plain.shape == (3, 3, 32, 32) and torch.equal(compiled, plain)


def test_a_file_records_how_it_was_drawn(chain, tmp_path):
    run = chain.runs / "diffusion"
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfa red ring\r\n\r\n  a blue square \r\n")
    draw(run, tmp_path / "out", f"--prompts={prompts}", "--sampler=DPMSolver", "--guidance=2", "--seed=5")
    metadata = read_text(tmp_path / "out" / "000001.png")
    assert metadata.pop("software").startswith("ldm ")
    assert metadata == {
        "prompt": "a blue square",
        "key": "a blue square/0",
        "sampler": "DPMSolver(num_steps=3, spacing=Trailing())",
        "steps": "3",
        "guidance": "ClassifierFree(scale=2.0)",
        "seed": "5",
        "size": "32",
        "precision": "32-true",
        "checkpoint": str(run),
        "checkpoint_sha256": Checkpoint.open(run).sha256,
    }
    assert read_text(tmp_path / "out" / "grid.png")["prompt"] == "a red ring\na blue square"


def test_a_caption_that_does_not_fit_is_cut_with_a_warning(chain, tmp_path):
    prompts = ["--prompt=a red ring", "--prompt=" + "red " * 40]
    with pytest.warns(UserWarning, match="1 of 2 captions are cut to the 20 tokens .* has 42"):
        assert len(draw(chain.runs / "diffusion", tmp_path, *prompts)) == 2


def test_a_caption_that_does_not_fit_may_be_read_in_chunks(chain, tmp_path):
    run, long = chain.runs / "diffusion", "red " * 40
    both = draw(run, tmp_path / "both", "--prompt=a red ring", f"--prompt={long}", "--long-prompts=chunks")
    # the same as without the other, and not what the cut caption gives
    assert (both[:1] - draw(run, tmp_path / "short", "--prompt=a red ring")).abs().max() <= 1
    with pytest.warns(UserWarning, match="1 of 1 captions are cut"):
        assert (both[1:] - draw(run, tmp_path / "cut", f"--prompt={long}")).abs().max() > 1
    assert read_text(tmp_path / "both" / "000000.png")["long_prompts"] == "chunks"


def test_a_negative_prompt_takes_the_place_of_the_empty_caption(chain, tmp_path):
    run, guided = chain.runs / "diffusion", ["--guidance=5", "--prompt=a red ring"]
    plain = draw(run, tmp_path / "plain", *guided)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a blue square", "negative_prompt": ""}\n{"prompt": "a blue square"}')
    more = [f"--prompts={prompts}", "--negative-prompt=a large blue ring"]
    found = draw(run, tmp_path / "negative", *guided, *more, "--preview=2")
    assert (found[:1] - plain).abs().max() > 1
    square = draw(run, tmp_path / "square", "--guidance=5", "--prompt=a blue square")
    assert (found[1:2] - square).abs().max() <= 1
    texts = [read_text(tmp_path / "negative" / f"{i:06d}.png") for i in range(3)]
    negative = [text.get("negative_prompt") for text in texts]
    assert negative == ["a large blue ring", None, "a large blue ring"]
    assert [path.name for path in (tmp_path / "negative" / "previews").iterdir()] == ["000000-step-002.png"]


def test_another_call_into_the_same_folder_is_refused(chain, tmp_path, capsys):
    command = [f"--checkpoint={chain.runs / 'diffusion'}", "--steps=1", "--device=cpu", f"--out={tmp_path}"]
    assert sample.main([*command, "--prompt=a", "--num-per-prompt=2"]) == 0
    assert sample.main([*command, "--prompt=a", "--num-per-prompt=2"]) == 0
    line = error_of(capsys, [*command, "--prompt=a"], sample.main)
    assert f"--out: '{tmp_path / '000001.png'}' is an image of another call" in line


def test_labels_and_size(digits, tmp_path):
    images = draw(digits, tmp_path, "--labels", "3", "4", "--num-per-prompt=3", "--size=16", "--guidance=2")
    assert images.shape == (6, 3, 16, 16)
    assert read_text(tmp_path / "000005.png")["prompt"] == "4"


def test_images_of_any_height_and_width(chain, tmp_path):
    images = draw(
        chain.runs / "diffusion", tmp_path / "a", "--prompt=a red ring", "--height=24", "--width=48"
    )
    assert images.shape == (1, 3, 24, 48)
    assert read_text(tmp_path / "a" / "000000.png")["size"] == "48x24"
    higher = draw(chain.runs / "diffusion", tmp_path / "b", "--prompt=a red ring", "--height=48")
    assert higher.shape == (1, 3, 48, 32)


def test_an_image_of_any_shape_is_redrawn(chain, tmp_path):
    old = torch.randint(0, 256, (32, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(old.numpy()).save(tmp_path / "old.png")
    mask = torch.zeros(32, 64, dtype=torch.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    files = [f"--image={tmp_path / 'old.png'}", f"--mask={tmp_path / 'mask.png'}"]
    found = draw(chain.runs / "diffusion", tmp_path / "out", "--prompt=a red ring", *files, "--width=64")
    is_kept = (found[0] == old.permute(2, 0, 1)).all(0)
    assert is_kept[:, :40].all() and not is_kept[:, 40:].all()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "old.png"
    noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return path


@pytest.mark.slow
def test_an_image_is_redrawn_the_less_the_lower_the_strength(chain, tmp_path, image):
    run, old = chain.runs / "diffusion", pil_to_tensor(Image.open(image)).int()
    more = ["--prompt=a red ring", f"--image={image}", "--steps=10"]
    ends = [draw(run, tmp_path / s, *more, f"--strength={s}")[0] for s in ("0.1", "0.5", "1")]
    plain = draw(run, tmp_path / "plain", "--prompt=a red ring", "--steps=10")[0]
    autoencoded = load_stage(str(chain.runs / "autoencoder"), Autoencoder)
    nearest = to_bytes(autoencoded.generate({"image": from_bytes(old[None].byte())}, 0))[0].int()
    misses = [(end - nearest).abs().float().mean().item() for end in ends]
    assert misses[0] < misses[1] < misses[2]
    # at full strength what is left of the image is alpha_T of it
    assert (ends[2] - plain).abs().float().mean() < 2
    assert read_text(tmp_path / "0.5" / "000000.png")["strength"] == "0.5"


def test_only_what_the_mask_shows_is_painted(chain, tmp_path, image):
    old, mask = pil_to_tensor(Image.open(image)).int(), torch.zeros(32, 32, dtype=torch.uint8)
    mask[8:20, 4:16] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    more = [
        "--prompt=a red ring",
        "--prompt=a blue square",
        f"--image={image}",
        f"--mask={tmp_path / 'mask.png'}",
    ]
    drawn = draw(chain.runs / "diffusion", tmp_path / "out", *more)
    assert torch.equal(drawn[:, :, mask == 0], old[:, mask == 0].expand(2, -1, -1))
    assert (drawn - old)[:, :, mask > 0].abs().float().mean() > 10


def test_samples_of_shards_serve_as_requests(chain, tmp_path):
    shards, run = f"--shards={chain.shards / 'val-000000.tar'}", chain.runs / "diffusion"
    drawn = draw(run, tmp_path / "a", shards, "--num=3")
    metadata = [read_text(tmp_path / "a" / f"{i:06d}.png")["prompt"] for i in range(3)]
    by_prompt = draw(run, tmp_path / "b", *[f"--prompt={text}" for text in metadata])
    assert (drawn - by_prompt).abs().max() <= 1


@pytest.mark.slow
def test_guidance_may_be_a_class(chain, tmp_path):
    run, prompt = chain.runs / "diffusion", "--prompt=a red ring"
    plain = draw(run, tmp_path / "plain", prompt, "--guidance=3")
    interval = ["--guidance=Interval", "--guidance.low=0", "--guidance.high=999"]
    inside = ["--guidance.guidance=ClassifierFree", "--guidance.guidance.scale=3"]
    assert torch.equal(draw(run, tmp_path / "interval", prompt, *interval, *inside), plain)
    weaker = ["--guidance=ldm.sampling.autoguidance.Autoguidance", f"--guidance.checkpoint={run}"]
    drawn = draw(run, tmp_path / "auto", prompt, *weaker, "--guidance.scale=2")
    # guided by itself it is itself
    assert (drawn - draw(run, tmp_path / "none", prompt, "--guidance=1")).abs().max() <= 1
    metadata = read_text(tmp_path / "auto" / "000000.png")["guidance"]
    assert f"checkpoint={run}, sha256={Checkpoint.open(run).sha256}, scale=2.0" in metadata
    metadata = read_text(tmp_path / "interval" / "000000.png")["guidance"]
    assert metadata == "Interval(low=0.0, high=999.0, guidance=ClassifierFree(scale=3.0))"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt=a", "--mask=m.png"], "--mask: there is no image to redraw, expected --image"),
        (["--prompt=a", "--strength=0.5"], "--strength: there is no image to redraw, expected --image"),
        (["--prompt=a", "--image=nowhere.png"], "nowhere.png"),
        (["--prompt=a", f"--image={__file__}"], "bytes are no JPEG, PNG or WebP image"),
        (
            ["--prompt=a", f"--image={__file__}", "--strength=0"],
            "--strength: got 0, expected a number >0 and <=1",
        ),
        (
            ["--prompt=a", "--layout=boxes.json"],
            "conditioned on text: got --layout and --prompt or --prompts",
        ),
        (["--prompt=a", "--shards=nowhere-*.tar"], "the samples are the requests, got --prompt"),
        (["--shards=nowhere-*.tar"], "nowhere-*.tar"),
        (["--labels", "3"], "is conditioned on text: got --labels, expected --prompt or --prompts"),
        ([], "conditioned on text: got nothing, expected --prompt or --prompts, or --shards"),
        (
            ["--prompt=a", "--size=33"],
            "--size: got 33, expected a multiple of 8: of the autoencoder's factor",
        ),
        (
            ["--prompt=a", "--width=36"],
            "--width: got 36, expected a multiple of 8: of the autoencoder's factor",
        ),
        (["--prompt=a", "--height=36"], "factor 4 times 2 of the network"),
        (["--prompt=a", "--sampler=Oiler"], "sampler: got Oiler, expected the import path of a class"),
        (
            ["--prompt=a", "--guidance=Intervall"],
            "guidance: got Intervall, expected float or the import path",
        ),
        (
            ["--prompt=a", "--guidance=Interval"],
            "--guidance: guidance, low, high: missing, but required",
        ),
        (["--prompt=a", "--steps=two"], "steps: got two, expected int"),
        (["--prompt=a", "--steps=0"], "--steps: got 0, expected a number >0"),
        (["--prompt=a", "--steps=9999"], "9999"),
        (["--prompts=nowhere.txt"], "nowhere.txt"),
        (
            ["--prompt=a", "--negative-prompt=b", "--guidance=1"],
            "--negative-prompt: the guidance is ClassifierFree, which does not use it: expected e.g.",
        ),
        (["--prompt=a", "--checkpoint=nowhere"], "checkpoint 'nowhere' does not exist"),
        (["--promt=a"], "--promt"),
    ],
)
def test_bad_input(chain, tmp_path, capsys, more, message):
    first = [f"--checkpoint={chain.runs / 'diffusion'}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    assert message in error_of(capsys, [*first, *more], sample.main)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_stage_and_an_unknown_class(chain, digits, tmp_path, capsys):
    line = error_of(capsys, [f"--checkpoint={chain.runs / 'clip'}", "--prompt=a"], sample.main)
    assert "is of stage 'clip', expected stage 'diffusion'" in line
    line = error_of(capsys, [f"--checkpoint={digits}", "--labels", "10"], sample.main)
    assert "label 10 is no class of the model, expected 0 to 9" in line
    more = ["--labels", "1", "--negative-prompt=b"]
    line = error_of(capsys, [f"--checkpoint={digits}", *more], sample.main)
    assert "--negative-prompt: the model is conditioned on label, expected one that" in line
    line = error_of(capsys, [f"--checkpoint={digits}", "--labels", "1", "--long-prompts=chunks"], sample.main)
    assert "--long-prompts: the conditioner is ClassLabel, expected one with a CLIP text tower" in line


def test_a_model_conditioned_on_the_image_redraws_none():
    options = Namespace(image="old.png", mask="mask.png", strength=0.3)
    with pytest.raises(ValueError, match="--strength: the model is conditioned on --image"):
        redraw(options, ["image", "mask"], Size(32, 32))
    options.strength = None
    assert redraw(options, ["image", "mask"], Size(32, 32)) is None


@pytest.mark.slow
def test_the_command_line_is_described_without_importing_lightning():
    program = "import sys, ldm.sample; ldm.sample.parser(); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
