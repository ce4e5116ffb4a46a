"""Sigmoid loss of images and captions (SigLIP), in its ring form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ldm.distributed.ring import pass_on
from ldm.losses.contrastive import PairLoss, Pairs
from ldm.types import send


class Sigmoid(PairLoss):
    """A decision on each pair of an image and a caption: Zhai et al. 2023 (arXiv:2303.15343), sec. 3.2.

    L = -1/N sum_ij log sigmoid(z_ij (t x_i . y_j + b)), z = 1 where image i belongs to caption j and -1
    elsewhere; all images of equal captions belong to each. Captions travel around the ring of processes, so
    that no process holds more than (B, B) logits, however many there are.

    The network needs a bias: ``net.init_logit_bias: -10``.
    """

    @override
    def __call__(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        text, blocks = pairs.text, []
        for step in range(pairs.world):
            if step:
                text = pass_on(text, pairs.rank, pairs.world)
            positives = pairs.positives((pairs.rank - step) % pairs.world)
            for part in pairs.parts():
                inputs = (pairs.image[part], text, pairs.scale, pairs.bias, positives[part])
                blocks.append(pairs.run(_block, *inputs))
        loss, best, is_own = (torch.cat(values) for values in zip(*blocks, strict=True))
        shape = (pairs.world, len(pairs))  # a row for each process's captions
        nearest = best.view(shape).argmax(0, keepdim=True)
        return loss.sum() / len(pairs), is_own.view(shape).gather(0, nearest).float().mean()

    @override
    def validate(self, bias: object) -> None:
        if bias is None:
            raise ValueError(
                "model.net.init_logit_bias: got none, expected the start of the bias that Sigmoid "
                "learns, e.g. -10"
            )


def _block(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast images (n, E) with the captions of a process (B, E).

    Returns:
        (n,) each: loss, the highest logit, and whether that caption is the image's own.
    """
    logits = scale * image @ text.T + bias
    belongs = send(positives, logits.device)
    loss = -F.logsigmoid(torch.where(belongs, logits, -logits)).sum(1)
    best, column = logits.detach().max(1)
    return loss, best, belongs.gather(1, column[:, None])[:, 0]
