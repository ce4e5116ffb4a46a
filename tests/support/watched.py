"""A mode of torch that refuses matrix products in half precision."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "attention", "linear", "matmul", "einsum")
HALF = (torch.bfloat16, torch.float16)


class NoHalf(TorchDispatchMode):
    """Counts matrix products and convolutions, the optimizer's too; refuses those in half precision."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func._schema.name for name in PRODUCTS):
            self.count += 1
            found = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype in HALF]
            assert not found, f"{func._schema.name} in {found[0]}"
        return func(*args, **(kwargs or {}))
