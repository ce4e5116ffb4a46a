"""torch's compiler for the blocks of networks, in training and without gradients."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import override

Compiled = Literal["auto", "on", "off"]
"""Values of --compile of commands that do not train."""
ENOUGH_PASSES = 100_000
"""Passes of one image through a network from which compiling it pays on a GPU.

On an H200 kl-f8 trained at 54 images a second, and at 88 with compiled blocks, and a pass of .3 TFLOP of its
encoder or of Stable Diffusion's U-Net takes 1 to 2 ms there: 100,000 such passes, as 2,000 images of 50
steps, gain about the minute that compiling takes. Not measured in these commands.
"""
COMPILE_HELP = (
    "Compile the networks' blocks, for full batches; the first one waits. auto: on a GPU, from "
    f"{ENOUGH_PASSES:,} images, times steps, on."
)
Signature = tuple[Any, ...]
"""Shapes, strides, dtypes and needs of gradients of a block's inputs."""


class Compiler:
    """The compiler of a run, until it fails: compiles forward and backward passes at their first inputs.

    Args:
        options: Of ``torch.compile``.
    """

    max_signatures = 1
    """Kinds of inputs that a block is compiled for, the first ones; others are computed plainly."""
    subject = "Compile: training"
    """Who goes on without it, for the warning."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.has_failed = False

    def applies(self) -> bool:
        """Whether what is computed now may be compiled."""
        return torch.is_grad_enabled()

    def compile(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Compile for inputs of one size each: kernels for any size are slower."""
        compiled: Callable[..., Any] = torch.compile(forward, dynamic=False, **self.options)
        return compiled

    def replace(self, blocks: Iterable[nn.Module]) -> None:
        """Replace the forward passes of blocks, in place, by compiled ones."""
        import torch._dynamo  # here: its import takes longer than --help may

        # of one class: several widths and sizes; at its limit of 8 torch would give up
        torch._dynamo.config.recompile_limit = 256
        for block in blocks:
            if not isinstance(block.forward, CompiledForward):
                # what calls the block is not replaced: hooks of parallel training stay outside
                block.forward = CompiledForward(block.forward, kind(block), self)

    def fail(self, error: Exception) -> None:
        """Warn, once, and let all blocks compute plainly from now on."""
        self.has_failed = True
        print(f"warning: {self.subject} goes on without it: {reason(error)}", file=sys.stderr, flush=True)


class InferenceCompiler(Compiler):
    """Compiles the passes of a command that computes no gradients: those of full batches.

    Args:
        choice: auto compiles on a GPU from ``ENOUGH_PASSES`` on, and never on a CPU.
    """

    backend: Any = "inductor"
    """Of ``torch.compile``."""

    max_signatures = 4
    """Guidance within an interval has two, a batch and twice as many; buckets have more."""
    subject = "--compile: the command"

    def __init__(self, choice: Compiled = "off") -> None:
        super().__init__({"backend": self.backend})
        self.choice = choice
        self.full = 0
        self.is_full = True

    @override
    def applies(self) -> bool:
        return self.is_full and not torch.is_grad_enabled()

    def begin(
        self,
        blocks: Iterable[nn.Module],
        device: torch.device,
        num_passes: int,
        batch_size: int,
        is_first: bool = True,
    ) -> None:
        """Compile blocks from their first full batch on, if that is worth it.

        Args:
            blocks: Blocks of the networks.
            device: Where they are.
            num_passes: Images that go through them, counted as often as they do.
            batch_size: Images of a full batch.
            is_first: Whether this process says so, of those that do the same.
        """
        is_worth_it = self.choice == "auto" and device.type == "cuda" and num_passes >= ENOUGH_PASSES
        self.full = batch_size
        chosen = [block for block in blocks if can_be_fused(block, is_trained=False)]
        if not chosen or not (is_worth_it or self.choice == "on"):
            return
        if is_first:
            print(
                "--compile: the first batch takes a minute or more, or seconds if it was compiled before",
                file=sys.stderr,
                flush=True,
            )
        self.replace(chosen)

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """Compute a batch: plainly if it is smaller than a full one, as the last one may be."""
        self.is_full = size == self.full
        try:
            yield
        finally:
            self.is_full = True


def can_be_fused(block: nn.Module, is_trained: bool = True) -> bool:
    """Tell whether a block has more than one layer with weights.

    Args:
        block: The block.
        is_trained: Whether only weights count that are trained.
    """
    layers = (module.parameters(recurse=False) for module in block.modules())
    return sum(any(w.requires_grad or not is_trained for w in weights) for weights in layers) > 1


def kind(block: nn.Module) -> str:
    """Name the class and the weights of a block: those of one kind share code, on inputs of one size."""
    return f"{type(block).__qualname__} {[tuple(weight.shape) for weight in block.parameters()]}"


class CompiledForward:
    """The forward pass of a block: compiled on inputs like the first ones, else plain.

    A copy, as of a module that is copied, computes plainly and with the weights of the copy.

    Args:
        forward: The plain one.
        name: Kind of the block.
        compiler: What compiles it, and tells when.
    """

    def __init__(self, forward: Callable[..., Any], name: str, compiler: Compiler) -> None:
        self.plain, self.name, self.compiler = forward, name, compiler
        self.compiled = compiler.compile(forward)
        self.signatures: set[Signature] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        plain: Callable[..., Any] = copy.deepcopy(self.plain, memo)
        return plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block."""
        if self.compiler.has_failed or not self.compiler.applies() or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        if is_in_torch_dispatch_mode(
            include_infra_modes=False
        ):  # arithmetic is counted, operator by operator
            return self.plain(*args, **kwargs)
        found = signature(args, kwargs)
        if found in self.signatures:
            return self.compiled(*args, **kwargs)
        if len(self.signatures) < self.compiler.max_signatures:
            return self._first(found, args, kwargs)
        return self.plain(*args, **kwargs)

    def _first(self, found: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compile, both passes where there are two, or warn that it cannot be done."""
        try:
            with one_process_first(f"{self.name} {found} {self.compiler.options}"), both_passes():
                result = self.compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.compiler.fail(error)
            return self.plain(*args, **kwargs)
        self.signatures.add(found)
        return result


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
    """Describe inputs: what differs in it would be compiled anew."""
    return tuple(map(_describe, (*args, *kwargs.values())))


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return value if isinstance(value, bool | int | float | str | None) else type(value)


@contextmanager
def both_passes() -> Iterator[None]:
    """Compile the backward pass with the forward pass: what fails in ``loss.backward()`` cannot be caught."""
    import torch._functorch.config

    name = "force_non_lazy_backward_lowering"  # of torch 2.11 to 2.14, if not of later ones
    config: Any = torch._functorch.config
    with config.patch(name, True) if hasattr(config, name) else nullcontext():
        yield


@contextmanager
def one_process_first(name: str) -> Iterator[None]:
    """Let the first process of a machine that gets here run, and the others, all at once, when it is done.

    Nothing in the block may wait for another process. Where files cannot be locked, all run at once.
    """
    with _locked(name) or nullcontext():
        yield


def _locked(name: str) -> IO[str] | None:
    try:
        import fcntl  # not on Windows

        from torch._inductor.runtime.cache_dir_utils import cache_dir

        path = Path(cache_dir()) / f"ldm-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_SH)
    except (ImportError, OSError):
        return None
    return file


def reason(error: BaseException) -> str:
    """Say in one line why a block could not be compiled, without the advice of the compiler."""
    inner = getattr(error, "inner_exception", error)
    text = " ".join(str(inner).partition("Set TORCHDYNAMO_VERBOSE")[0].split())
    return shorten(f"{type(inner).__name__}: {text}", 220, placeholder=" ...")
