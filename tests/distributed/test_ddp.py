"""Buffers that processes must synchronise."""

import open_clip
from torch import nn

from ldm.distributed.ddp import has_running_statistics


def test_only_what_follows_the_batches_is_sent():
    assert not has_running_statistics(nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2)))
    assert not has_running_statistics(nn.InstanceNorm2d(2))
    assert has_running_statistics(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(2))))


def test_a_clip_of_open_clip_with_a_resnet_has_such_buffers_and_one_with_a_transformer_has_none():
    text = {"context_length": 9, "width": 8, "heads": 1, "layers": 1}
    resnet = {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}
    transformer = {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "head_width": 4}
    assert has_running_statistics(open_clip.CLIP(8, resnet, text))
    assert not has_running_statistics(open_clip.CLIP(8, transformer, text))
