"""What a configuration needs on GPUs: counted bytes beside those of real steps, and closed forms."""

import pytest
import torch

from benchmarks.plan.__main__ import main
from benchmarks.plan.communication import NODE, longest_share, traffic
from benchmarks.plan.memory import (
    GIB,
    USABLE,
    Memory,
    absent_gpu,
    frozen_tensors,
    measure,
    parabola,
    place,
    size_of,
    split,
)
from benchmarks.plan.samples import samples
from benchmarks.plan.stages import build
from benchmarks.plan.storages import kept
from ldm.callbacks.activation_checkpointing import ActivationCheckpointing
from ldm.rng import SampleNoise
from ldm.stage_protocols import blocks_of

CPU = torch.device("cpu")
BATCH = 8


def real_step(name, recomputes=False):
    """Bytes that hooks count in a forward pass on this CPU, and by how much its memory grew."""
    planned = build(name)
    place(planned.stage, CPU)
    for weight in [*planned.stage.parameters(), *frozen_tensors(planned.stage)]:
        weight.data.zero_()  # what memory held before may be slow to compute with
    batch = samples(planned.stage, planned.side, BATCH, CPU)
    found = {}

    def step():
        found["loss"] = planned.stage.losses(batch, SampleNoise(0, batch["key"]))["loss"]

    blocks = blocks_of(planned.stage) if recomputes else []
    counted = kept(step, [*planned.stage.parameters(), *frozen_tensors(planned.stage)], blocks)[0]
    found.clear()
    if recomputes:
        ActivationCheckpointing().setup(None, planned.stage, "fit")
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    return counted, sum(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize(
    ("name", "more_on_gpu"),  # attention there keeps statistics of 32 positions at least: this CLIP has 2
    [
        ("demo/diffusion", 0.01),
        ("demo/autoencoder", 0.03),
        ("demo/clip", 0.2),
        ("conditions/composite", 0.01),  # text and mask
        ("conditions/layout", 0.03),
        ("conditions/semantic", 0.01),
        ("conditions/super-resolution", 0.01),
    ],
)
def test_counted_activations_are_those_of_a_step_on_a_cpu(name, more_on_gpu):
    counted, grown = real_step(name)
    assert counted == pytest.approx(grown, rel=0.01)
    planned = build(name)
    with absent_gpu() as device:
        place(planned.stage, device)
        absent = measure(planned.stage, planned.side, torch.float32, device)
    assert counted <= absent.kept(BATCH) < (1 + more_on_gpu) * counted


@pytest.mark.parametrize("name", ["demo/diffusion", "demo/autoencoder", "demo/clip"])
def test_what_stays_of_recomputed_blocks_is_counted_as_a_step_on_a_cpu_keeps_it(name):
    counted, grown = real_step(name, recomputes=True)
    states = len(blocks_of(build(name).stage)) * torch.get_rng_state().nbytes  # kept with each, on a CPU
    assert counted == pytest.approx(grown - states, rel=0.02)
    assert counted < 0.8 * real_step(name)[0]


def test_a_recomputed_block_keeps_its_input_and_for_a_while_what_is_inside():
    blocks = [
        torch.nn.Sequential(torch.nn.Linear(n, n), torch.nn.SiLU(), torch.nn.Linear(n, n)) for n in (8, 8)
    ]
    net, x = torch.nn.Sequential(*blocks), torch.zeros(4, 8, requires_grad=True)
    row = 4 * 8 * 4
    assert kept(lambda: net(x), net.parameters()) == [6 * row]  # two inputs, and twice before and after SiLU
    assert kept(lambda: net(x), net.parameters(), blocks) == [2 * row, 2 * row, 2 * row]


def test_what_fsdp2_splits_and_what_it_gathers():
    stage = build("demo/diffusion").stage
    weights = size_of(p for p in stage.parameters() if p.requires_grad)
    memory, blocks = Memory(weights, 100, 2 * weights, weights, (0, 0, 0)), blocks_of(stage)
    sizes = sorted(4 * sum(p.numel() for p in block.parameters()) for block in blocks)
    rest = weights - sum(sizes)
    for half in (False, True):
        gathered = (rest + sizes[-1] + sizes[-2]) / (2 if half else 1) + max(rest, sizes[-1])
        found = split(memory, stage, 4, half)
        assert found.fixed == pytest.approx(5 * weights / 4 + 100 + gathered, abs=8)


def test_half_precision_keeps_about_half():
    planned = build("demo/diffusion")
    with absent_gpu() as device:
        place(planned.stage, device)
        one, half = (
            measure(planned.stage, planned.side, dtype, device) for dtype in (torch.float32, torch.bfloat16)
        )
    assert (one.weights, one.moments, one.frozen) == (half.weights, half.moments, half.frozen)
    assert 0.45 < (half.kept(32) - half.kept(16)) / (one.kept(32) - one.kept(16)) < 0.6


def test_counts_are_extrapolated_by_a_parabola_and_the_largest_batch_just_fits():
    curve = [3 + 5 * n + 7 * n**2 for n in range(200)]
    assert all(parabola((curve[2], curve[4], curve[8]), n) == curve[n] for n in (1, 2, 8, 100, 199))
    memory = Memory(GIB, 0, 2 * GIB, GIB, tuple(GIB // 10 * n for n in (2, 4, 8)))
    largest = memory.largest(24)
    assert memory.fixed == 5 * GIB and largest == 166  # (0.9 x 24 - 5) / 0.1
    assert memory.fixed + memory.kept(largest) <= USABLE * 24 * GIB < memory.fixed + memory.kept(largest + 1)
    assert memory.largest(5) == 0


def test_traffic_of_a_diffusion_follows_from_its_weights():
    stage = build("demo/diffusion").stage
    weights = 4 * sum(p.numel() for p in stage.parameters() if p.requires_grad)
    few, many = ({each.name: each for each in traffic(stage, 1, world)} for world in (NODE, 64))
    assert few["ddp, float32"].within == 2 * weights * 7 / 8 and few["ddp, float32"].between == 0
    assert many["ddp, gradients: bfloat16"].between == weights * 63 / 64
    assert many["fsdp2, float32"].between == 3 * weights * 63 / 64
    assert many["fsdp2, weights: bfloat16"].between == 2 * weights * 63 / 64
    hsdp = many["hsdp, weights: bfloat16"]
    assert (hsdp.within, hsdp.between) == (2 * weights * 7 / 8, 2 * weights / 8 * 7 / 8)
    assert hsdp.seconds < many["fsdp2, weights: bfloat16"].seconds
    assert many["Muon's updates with ddp, within a node"] == few["Muon's updates with ddp, within a node"]
    matrices = [torch.empty(4, 4, device="meta")] * 6
    assert longest_share(matrices, 1) == 0 and longest_share(matrices, 4) == 2 * 3 * 2 * 16


def test_traffic_of_clip_has_its_pairs():
    stage = build("demo/clip").stage
    names = {each.name.partition(":")[0]: each for each in traffic(stage, 100, NODE)}
    assert names["Softmax"].within == 4 * 7 * 100 * 96 * 4  # vectors of 96, both ways, images and captions


def test_the_command_prints_both_tables_and_names_what_is_wrong(capsys, tmp_path):
    options = ["--gpus", "8", "--cards", "24", "--precision", "32-true", "--activation-checkpointing"]
    assert main(["demo/pixels", *options]) == 0
    out = capsys.readouterr().out
    assert (
        "fsdp2: GPUs" in out
        and "largest batch:" in out
        and "| received by each GPU in a step | 8 GPUs |" in out
    )
    for text, reason in (
        ("run: x", "got no model, expected the configuration of a stage"),
        ("{base: cifar10/ddpm, data: {image_size: null}}", "data.image_size: got none"),
        (
            "{base: diffusion/sd1, model: {init_args: {conditioner: {init_args: {checkpoint: runs/x}}}}}",
            "got runs/x, expected the run folder of a configuration",
        ),
    ):
        (tmp_path / "own.yaml").write_text(text)
        assert main([str(tmp_path / "own.yaml")]) == 2
        assert reason in capsys.readouterr().err
    assert main(["demo/clip", "--gpus", "12"]) == 2
    assert "--gpus: got 12, expected at most 8, or a multiple of it" in capsys.readouterr().err
