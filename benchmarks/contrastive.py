"""CLIP's step beside open_clip's: ``python -m benchmarks.contrastive [--batch 128 --micro-batch 32]``.

The same weights, images and token ids, forward and backward, in turn: all pairs at once, and with gradient
caching, ours by ``micro_batch``, theirs as open_clip trains with ``--accum-freq``: features of all parts
without gradients, then each part once more, contrasted with the cached features of the others. Their scheme
adds up the gradients of scale and bias once for each part: these two are left out where gradients are
compared. Memory is what tensors take at most during a step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from ldm.losses.sigmoid import Sigmoid
from ldm.nets.clip import NUMBERS, CLIPModel
from ldm.nets.text import caption_ids, tokenize
from ldm.optim.recipes import AdamW
from ldm.rng import SampleNoise
from ldm.stages.clip import CLIP
from ldm.types import Batch, Caption

WIDTH, SIDE, PATCH, LAYERS, CONTEXT = 192, 64, 8, 4, 24
Step = Callable[[], Tensor]
"""Computes the loss and its gradients."""


def stage(bias: float | None, micro_batch: int | None) -> CLIP:
    """Build a CLIP of two small transformers."""
    torch.manual_seed(0)
    vision = {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "head_width": 48}
    text = {"context_length": CONTEXT, "width": WIDTH, "heads": 4, "layers": LAYERS}
    net = CLIPModel(WIDTH, vision, text, init_logit_bias=bias)
    return CLIP(net, AdamW(), Sigmoid() if bias is not None else None, micro_batch)


def samples(num: int) -> Batch:
    """Make images, and captions whose ids a worker of the loader has made."""
    texts = [f"a photo of object number {n} beside a large blue square" for n in range(num)]
    images = torch.randn(num, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return {
        "key": [str(n) for n in range(num)],
        "image": images,
        "text": [Caption(text, caption_ids(text)) for text in texts],
    }


def features(model: Any, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode as open_clip's ``CLIP.forward`` does."""
    return model.encode_image(image, normalize=True), model.encode_text(ids, normalize=True)


class Theirs:
    """open_clip's model and loss.

    Args:
        model: An ``open_clip.CLIP``.
        batch: Images and captions.
        micro_batch: Pairs of a part; None takes all at once.
    """

    def __init__(self, model: nn.Module, batch: Batch, micro_batch: int | None) -> None:
        self.model: Any = model
        self.loss = ClipLoss() if self.model.logit_bias is None else SigLipLoss()
        image, ids = batch["image"], tokenize(batch["text"], CONTEXT)
        size = micro_batch or len(image)
        self.parts = list(zip(image.split(size), ids.split(size), strict=True))

    def contrast(self, image: Tensor, text: Tensor) -> Tensor:
        """Compute the loss of all pairs."""
        bias = self.model.logit_bias
        given = {} if bias is None else {"logit_bias": bias}
        loss: Tensor = self.loss(image, text, self.model.logit_scale.exp(), **given)
        return loss

    def part(self, number: int, cached: list[Any]) -> Tensor:
        """Compute the loss with the gradients of one part."""
        found = list(cached)
        found[number] = features(self.model, *self.parts[number])
        images, texts = zip(*found, strict=True)
        return self.contrast(torch.cat(images), torch.cat(texts))

    def step(self) -> Tensor:
        """Compute the loss and its gradients, part by part."""
        cached: list[Any] = [None]
        if len(self.parts) > 1:
            with torch.no_grad():
                cached = [features(self.model, *each) for each in self.parts]
        for number in range(len(self.parts)):
            loss = self.part(number, cached)
            loss.backward()
        return loss.detach()


def ours(stage: CLIP, batch: Batch) -> Step:
    """Compute what ``ldm.fit`` computes of a step."""

    def step() -> Tensor:
        loss = stage.losses(batch, SampleNoise("0", batch["key"]))["loss"]
        loss.backward()
        return loss.detach()

    return step


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a network, and take them away."""
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def peak(step: Step) -> int:
    """Count the bytes that tensors take at most during a step, over those before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = largest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            largest = max(largest, now)
    return largest


def seconds(step: Step, net: nn.Module) -> float:
    """Time one step by the processor's time."""
    begun = time.process_time()
    step()
    found = time.process_time() - begun
    net.zero_grad(set_to_none=True)
    return found


def compare(bias: float | None, num: int, micro_batch: int | None, rounds: int) -> str:
    """Time both, and make a row of the table."""
    batch, mine = samples(num), stage(bias, micro_batch)
    theirs = Theirs(copy.deepcopy(mine.net.model), batch, micro_batch)
    steps: dict[str, tuple[Step, nn.Module]] = {
        "ours": (ours(mine, batch), mine.net.model),
        "theirs": (theirs.step, theirs.model),
    }
    for step, _ in steps.values():
        step()
    one, two = gradients(mine.net.model), gradients(theirs.model)
    compared = [name for name in two if name not in NUMBERS]
    largest = max(float(two[name].abs().max()) for name in compared)
    apart = max(float((one[name] - two[name]).abs().max()) for name in compared) / largest
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step, net) in steps.items():
            times[name].append(seconds(step, net))
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["theirs"], strict=True))
    memory = []
    for step, net in steps.values():
        memory.append(peak(step))
        net.zero_grad(set_to_none=True)
    name = "softmax" if bias is None else "sigmoid"
    parts = "whole" if micro_batch is None else f"parts of {micro_batch}"
    spent = " | ".join(f"{statistics.median(times[who]) * 1e3:.0f}" for who in steps)
    held = " | ".join(f"{size / 1e6:.1f}" for size in memory)
    return f"| {name}, {parts} | {spent} | {ratio:.2f} | {held} | {apart:.0e} |"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = (
        "ours, ms of a core | open_clip | ours / open_clip | ours, MB at most | open_clip | gradients apart"
    )
    print(f"{options.batch} pairs of {SIDE} px in patches of {PATCH}, {LAYERS} layers of {WIDTH}, float32\n")
    print(f"| loss | {heads} |\n|---|---|---|---|---|---|---|")
    for bias, micro_batch in (
        (None, None),
        (None, options.micro_batch),
        (-10.0, None),
        (-10.0, options.micro_batch),
    ):
        print(compare(bias, options.batch, micro_batch, options.rounds), flush=True)


if __name__ == "__main__":
    main()
