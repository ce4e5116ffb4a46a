"""Faster kernels from torch's compiler."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, Literal

import lightning as L
import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import override

from ldm.stage_protocols import blocks_of

Mode = Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
Signature = tuple[Any, ...]
"""Shapes, strides, dtypes and needs of gradients of a block's inputs."""


class Compile(L.Callback):
    """Compiles the blocks of the networks with ``torch.compile`` in the first steps, in place.

    Block by block: equal blocks reuse code, so that the first step waits less, and gradients are sent
    while others are still computed. Only inputs of the sizes of the first step are. Validation,
    sampling and a smaller last batch compute plainly, so that nothing is compiled in the middle of a run.
    Names of weights stay as they are, in checkpoints too. Losses differ by rounding; the same run compiled
    twice has the same. Where the compiler is missing or fails, a warning says so and the run goes on without.

    Networks without ``blocks()``, frozen ones, and blocks of a single layer, where nothing can be fused, are
    left alone. The results are kept for later runs in ``TORCHINDUCTOR_CACHE_DIR``, by default in the folder
    for temporary files. Of several processes of a machine one compiles a kind of block, and the others read
    it there. Needs a C++ compiler.

    Args:
        backend: ``inductor``, or another of ``torch.compile``'s.
        mode: ``reduce-overhead`` also records CUDA graphs, which need more memory; ``max-autotune`` also
            tries kernels, which takes minutes and may choose others in the next run.
        on_cpu: Whether to compile on a CPU too.
    """

    def __init__(self, backend: str = "inductor", mode: Mode | None = None, on_cpu: bool = False) -> None:
        self.backend, self.mode, self.on_cpu = backend, mode, on_cpu
        self.compiler = Compiler({"backend": backend, "mode": mode})
        self._blocks: list[nn.Module] = []

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # after ``setup`` of all callbacks: what recomputes a block is compiled with it, in any order
        self._blocks = []
        if trainer.strategy.root_device.type != "cuda" and not self.on_cpu:
            return
        # of one class: several widths and sizes; at its limit of 8 torch would give up
        torch._dynamo.config.recompile_limit = 256
        self._blocks = [block for block in blocks_of(pl_module) if can_be_fused(block)]
        for block in self._blocks:
            if not isinstance(block.forward, CompiledForward):
                # what calls the block is not replaced: hooks of parallel training stay outside
                block.forward = CompiledForward(block.forward, kind(block), self.compiler)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._blocks and trainer.is_global_zero:
            kinds = len({kind(block) for block in self._blocks})
            print(
                f"Compile: {len(self._blocks)} blocks of {kinds} kinds are compiled in the first steps, "
                "which takes a minute or more, or seconds if an earlier run compiled them",
                flush=True,
            )

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        if self.mode in WITH_CUDA_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()


def can_be_fused(block: nn.Module) -> bool:
    """Tell whether a block has more than one layer with weights that are trained."""
    layers = (module.parameters(recurse=False) for module in block.modules())
    return sum(any(weight.requires_grad for weight in weights) for weights in layers) > 1


def kind(block: nn.Module) -> str:
    """Name the class and the weights of a block: those of one kind share code, on inputs of one size."""
    return f"{type(block).__qualname__} {[tuple(weight.shape) for weight in block.parameters()]}"


class Compiler:
    """The compiler of a run, until it fails.

    Args:
        options: Of ``torch.compile``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.has_failed = False

    def compile(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Compile for inputs of one size each: kernels for any size are slower."""
        compiled: Callable[..., Any] = torch.compile(forward, dynamic=False, **self.options)
        return compiled

    def fail(self, error: Exception) -> None:
        """Warn, once, and let all blocks compute plainly from now on."""
        self.has_failed = True
        print(f"warning: Compile: training goes on without it: {reason(error)}", file=sys.stderr, flush=True)


class CompiledForward:
    """The forward pass of a block: compiled for training on inputs like the first ones, else plain.

    A copy, as of a module that is copied, computes plainly and with the weights of the copy.

    Args:
        forward: The plain one.
        name: Kind of the block.
        compiler: What compiles it.
    """

    def __init__(self, forward: Callable[..., Any], name: str, compiler: Compiler) -> None:
        self.plain, self.name, self.compiler = forward, name, compiler
        self.compiled = compiler.compile(forward)
        self.signature: Signature | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        plain: Callable[..., Any] = copy.deepcopy(self.plain, memo)
        return plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block."""
        if self.compiler.has_failed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        if is_in_torch_dispatch_mode(
            include_infra_modes=False
        ):  # arithmetic is counted, operator by operator
            return self.plain(*args, **kwargs)
        found = signature(args, kwargs)
        if self.signature is None:
            return self._first(found, args, kwargs)
        return (self.compiled if found == self.signature else self.plain)(*args, **kwargs)

    def _first(self, found: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compile both passes, or warn that it cannot be done."""
        try:
            with one_process_first(f"{self.name} {found} {self.compiler.options}"), both_passes():
                result = self.compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.compiler.fail(error)
            return self.plain(*args, **kwargs)
        self.signature = found
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
