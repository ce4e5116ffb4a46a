"""Distributed training: process groups, launch, DDP, FSDP2."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    ddp="DDP",
    fsdp="FSDP2 HSDP",
)
