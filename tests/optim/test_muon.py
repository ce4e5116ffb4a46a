import pytest
import torch

from ldm.optim.muon import QUINTIC, MuonOptimizer, orthogonalize


@pytest.mark.parametrize(("dtype", "leak"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_singular_values_end_near_one_and_singular_vectors_stay(dtype, leak):
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        matrices = torch.randn(shape, generator=generator)
        result = orthogonalize(matrices, dtype=dtype).float()
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
    result = orthogonalize(matrices, dtype=dtype)
    assert result.dtype == dtype
    assert (result.double() - expected).norm() < rtol * expected.norm()


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
        (torch.zeros(8, 36), gradient.flatten(1)),
    ):
        p.requires_grad_().grad = g.clone().to(p.device).contiguous().view_as(p)
        MuonOptimizer([p], lr=0.1).step()
        results.append(p.detach().reshape(8, 36))
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
