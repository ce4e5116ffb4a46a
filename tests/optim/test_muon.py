import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.optim.muon import QUINTIC, MuonOptimizer, orthogonalize


@pytest.mark.parametrize(("dtype", "leak"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_singular_values_end_near_one_and_singular_vectors_stay(dtype, leak):
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        matrices = torch.randn(shape, generator=generator)
        result = orthogonalize([matrices], dtype=dtype)[0].float()
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5 and values.max() < 1.3
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        # in the basis of its own singular vectors the result is diagonal, up to rounding
        rotated = u.mT @ result @ vh.mT
        off = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
        assert off.norm() / rotated.norm() < leak


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    # rounding of 2**-53, 2**-24 and 2**-9, enlarged by five iterations
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)],
)
def test_singular_values_are_those_of_the_polynomial(dtype, rtol):
    a, b, c = QUINTIC
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = values / (matrices.norm(dim=(1, 2))[:, None] + 1e-7)
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    expected = u @ torch.diag_embed(values) @ vh
    (result,) = orthogonalize([matrices], dtype=dtype)
    assert result.dtype == dtype
    assert (result.double() - expected).norm() < rtol * expected.norm()


def plain(matrices, dtype):
    """Five iterations as they are usually written."""
    a, b, c = QUINTIC
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def spectra(rows, columns):
    """Matrices of several spectra: flat, falling by powers, of low rank, and one large value above noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, rows, columns, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(noise, full_matrices=False)
    falls = torch.arange(1, rows + 1, dtype=torch.float64)
    rank = (falls <= 4).double()
    values = [0 * falls + 1, 1 / falls, 1 / falls**2, rank, rank + 1e-3, 10 ** (-6 * falls / rows)]
    return u @ torch.diag_embed(torch.stack(values)) @ vh


@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_long_matrices_are_about_as_exact_as_by_plain_iterations(dtype, more):
    # without the second Gram matrix the error is 4e-4 in float32, and the result useless in bfloat16
    for rows, columns in ((32, 64), (48, 432)):
        matrices = spectra(rows, columns)
        exact = plain(matrices, torch.float64)
        errors = [
            (found.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
            for found in (orthogonalize([matrices], dtype=dtype)[0], plain(matrices, dtype))
        ]
        assert (errors[0] < 1.5 * errors[1] + more).all()


def test_matrices_of_one_width_are_the_same_alone_and_in_one_batch():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 16, 40), (1, 64, 16), (3, 16, 16), (1, 16, 17), (2, 8, 40)]
    stacks = [torch.randn(shape, generator=generator) for shape in shapes]
    for stack, found in zip(stacks, orthogonalize(stacks), strict=True):
        alone = torch.cat([orthogonalize([matrix[None]])[0] for matrix in stack])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


def test_long_matrices_take_fewer_multiplications():
    def count(*shape):
        matrices = torch.empty(2, *shape, device="meta")
        with FlopCounterMode(display=False) as counter:
            orthogonalize([matrices])
        return counter.get_total_flops()

    product = 2 * 2 * 8**3  # of two 8 x 8 matrices, in a batch of two
    assert count(8, 8) == 5 * 3 * product
    # twice: Gram matrix and application; 5 factors, 3 products of them, 2 x 3 for the Gram matrices between
    assert count(8, 72) == count(72, 8) == (2 * 2 * 9 + 5 + 3 + 2 * 3) * product


def test_update_has_the_promised_root_mean_square():
    for shape in ((32, 32, 3, 3), (64, 16), (16, 64)):
        p = torch.zeros(shape, requires_grad=True)
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        MuonOptimizer([p], lr=1.0, weight_decay=0.0).step()
        rms = p.detach().square().mean().sqrt().item()
        # all min(shape) singular values near 1: rms = sqrt(min / (rows * columns)) * 0.2 sqrt(max) = 0.2
        assert 0.14 < rms < 0.24


def test_a_kernel_is_its_flattened_matrix_in_any_memory_format():
    gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    results = []
    for p, g in (
        (torch.zeros(8, 4, 3, 3), gradient),
        (torch.zeros(8, 4, 3, 3).to(memory_format=torch.channels_last), gradient),
        (
            torch.zeros(8, 36),
            gradient.movedim(1, -1).flatten(1),
        ),  # columns in the order of channels-last memory
    ):
        p.requires_grad_().grad = g.clone().to(p.device).contiguous().view_as(p)
        MuonOptimizer([p], lr=0.1).step()
        results.append(p.detach().movedim(1, -1).reshape(8, 36))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[1])


def test_vectors_and_tables_take_exactly_the_step_of_torch_adam():
    generator = torch.Generator().manual_seed(3)
    ours = [torch.randn(7, generator=generator), torch.randn(5, 3, generator=generator)]
    theirs = [p.clone().requires_grad_() for p in ours]
    ours = [p.requires_grad_() for p in ours]
    muon = MuonOptimizer([{"params": ours, "orthogonal": False}], lr=1e-2, betas=(0.9, 0.95))
    adam = torch.optim.Adam(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        adam.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_state_dict_continues_bit_for_bit():
    def run(cut):
        torch.manual_seed(4)
        layer = torch.nn.Linear(6, 4)
        optimizer = MuonOptimizer(layer.parameters(), lr=1e-2)
        for i in range(6):
            if i == cut:
                state = optimizer.state_dict()
                optimizer = MuonOptimizer(layer.parameters(), lr=1e-2)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            layer(torch.ones(2, 6) * i).square().sum().backward()
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(run(None), run(3))
