"""Interface of a conditioner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from ldm.io.config import Configurable
from ldm.latents.space import LatentSpace
from ldm.rng import SampleNoise
from ldm.types import Batch, Cond


class Conditioner(Configurable, nn.Module, ABC):
    """Turns a batch into a condition. Any encoder that produces a sequence of tokens can be one.

    Args:
        dropout: Fraction of training samples that get the null condition, in [0, 1]; what classifier-free
            guidance needs (Ho & Salimans 2022).
    """

    reads: tuple[str, ...] = ()
    """Fields of a batch that it conditions on; none of them for ``()``."""
    token_width: int | None = None
    """D of ``Cond.tokens``; None without tokens."""
    vector_width: int | None = None
    """E of ``Cond.vector``; None without a vector."""
    spatial_channels: int = 0
    """C' of ``Cond.spatial``; 0 without it. Known after ``bind``."""
    context_length: int | None = None
    """CLIP tokens of a caption that it reads, begin and end marks included; None without a limit."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"conditioner.dropout must be in [0, 1], got {dropout}")
        self.dropout = dropout

    def bind(self, latents: LatentSpace) -> None:
        """Receive the space that diffusion happens in; called once, before widths are read."""
        return None

    def reads_stored(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that it reads in training, see ``ldm.stage_protocols.ReadsFields``."""
        return self.reads

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        """What decides stored text embeddings that it reads; None if it reads none."""
        return None

    @abstractmethod
    def forward(self, batch: Batch) -> Cond:
        """Encode the fields of ``batch``, B samples."""

    @abstractmethod
    def null(self, batch: Batch) -> Cond:
        """Return the null condition, for as many samples and of the same shapes as ``batch``.

        Where the batch has ``negative_text``, a conditioner of captions returns the condition of these.
        """

    def check(self, batch: Batch) -> None:
        """Check a user's request before sampling; warn of captions that are truncated, as training does.

        Raises:
            ValueError: If something would be misread; the message names what was found and what fits.
        """
        self.check_values(batch)

    def check_values(self, batch: Batch) -> None:
        """Check that the model knows every class of ``batch``, while that is still on the CPU.

        Called for each batch before it moves to its device. There, an index out of range of an
        embedding ends the process, and a check would synchronise with the device at every step.

        Raises:
            ValueError: If it does not; the message names what was found and what fits.
        """

    def truncated(self, batch: Batch) -> dict[str, Tensor]:
        """Return the fraction of samples whose condition is cut to what fits, by the name that is logged."""
        return {}

    def dropped(self, batch: Batch, noise: SampleNoise) -> Cond:
        """Encode ``batch`` with dropout.

        Args:
            batch: B samples.
            noise: Decides which samples get the null condition: one number each, drawn at any ``dropout``.
        """
        return self._drop(self(batch), batch, noise)

    def _drop(self, cond: Cond, batch: Batch, noise: SampleNoise) -> Cond:
        keep = noise.uniform() >= self.dropout
        return cond if self.dropout == 0.0 else cond.where(keep, self.null(batch))

    def _require(self, batch: Batch) -> None:
        lacking = [field for field in self.reads if field not in batch]
        if lacking:
            raise ValueError(
                f"{type(self).__name__} conditions on {' and '.join(self.reads)}, but the batch has no "
                f"{' and no '.join(lacking)}: add it to data.fields, or give it when sampling"
            )

    @property
    def classes(self) -> dict[str, int]:
        """Number of classes of each field that it reads classes of."""
        return {}

    @property
    def drops(self) -> bool:
        """Whether training uses the null condition."""
        return self.dropout > 0.0

    @property
    def model_folders(self) -> dict[str, str]:
        """Folders of other programs' models that it is built on, with the SHA-256 of their files."""
        return {}

    @property
    def upstream(self) -> dict[str, str]:
        """Checkpoints that this conditioner is built on, with their SHA-256."""
        return {}
