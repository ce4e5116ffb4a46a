"""Precision of a run: named or derived from the processor, reported, and the same on all processes."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
import torch

from ldm.hardware import choose_precision, device_of, warn_of_emulation


@dataclass(frozen=True)
class Precision:
    """Resolved ``trainer.precision`` on a device; as a string, how a run reports it.

    Args:
        name: Lightning's, not auto.
        device: Where networks compute.
        is_auto: Whether ``auto`` selected it.
    """

    name: str
    device: torch.device
    is_auto: bool

    @classmethod
    def choose(cls, wanted: str, accelerator: str) -> Precision:
        """Replace auto by what the device computes natively.

        Args:
            wanted: ``trainer.precision``.
            accelerator: ``trainer.accelerator``.

        Raises:
            ValueError: If weights are to be in half precision, which would lose small updates, or 16-mixed is
                wanted on a CPU, where Lightning would train in another.
        """
        device = device_of(accelerator)
        if wanted in ("bf16-true", "16-true"):
            mixed = wanted.replace("true", "mixed")
            raise ValueError(
                f"trainer.precision: got {wanted}, expected {mixed}: weights, their average and moments stay "
                "float32; where they need too much memory, trainer.strategy=fsdp2 splits them over the GPUs"
            )
        if wanted == "16-mixed" and device.type == "cpu":
            raise ValueError("trainer.precision: got 16-mixed, which is for GPUs; expected auto on a CPU")
        if wanted == "auto":
            return cls(choose_precision(device), device, is_auto=True)
        return cls(wanted, device, is_auto=False)

    def __str__(self) -> str:
        if not self.is_auto:
            return self.name
        native = "native" if self.name == "bf16-mixed" else "not native"
        return f"{self.name} (auto: bfloat16 is {native} on this {self.device.type})"

    def warning(self) -> str | None:
        """Return a warning with the measured cost if the device only emulates it, else None."""
        return warn_of_emulation("trainer.precision", self.name, self.device)


def check_precision(trainer: L.Trainer, name: str) -> None:
    """Check that all processes compute in the same precision.

    Args:
        trainer: Of a run whose processes have met.
        name: The precision of this process.

    Raises:
        ValueError: If they do not: then their processors differ.
    """
    first = trainer.strategy.broadcast(name)
    if name != first:
        raise ValueError(
            f"trainer.precision: {first} on process 0, but {name} on process {trainer.global_rank}: "
            "their processors differ, so auto does too: name one of the two"
        )
