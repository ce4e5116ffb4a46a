"""Both players' gradients reach what they must and nothing else, and one step is two steps of plain torch."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from ldm.losses import L1, L2, R1, Adversarial, Hinge, LearnedVariance, LeCam, NonSaturating
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.discriminator import PatchGAN
from ldm.rng import SampleNoise
from ldm.stages.autoencoder import Autoencoder

KEYS = list("abcd")


def batch(size=16):
    image = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"key": KEYS, "image": image}


def stage(*terms, **more):
    torch.manual_seed(0)
    net = KLAutoencoder(3, [8, 8], 1, 4)
    discriminators = [PatchGAN(8, 2, norm_groups=4) for _ in terms]
    losses = [term(discriminator) for term, discriminator in zip(terms, discriminators, strict=True)]
    return Autoencoder(net, 1e-2, losses=losses, **more).train()


def loss_of(module, data=None):
    data = data or batch()
    return module.losses(data, SampleNoise(0, data["key"]))


def grads(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def plain_losses(net, discriminator, weight, game, bound=1e4):
    """Two losses of plain torch: Esser et al. 2021, Eq. 7 by two more passes, as their program has it."""
    data = batch()
    posterior = net.encode(data["image"])
    output = net.decode(posterior.sample(SampleNoise(0, KEYS).like(posterior.mean)))
    error = (output - data["image"]).square().sum() / len(KEYS)
    variance = posterior.log_var.exp()
    kl = 0.5 * (posterior.mean.square() + variance - 1 - posterior.log_var).sum() / len(KEYS)
    real, fake, seen = (discriminator(image) for image in (data["image"], output.detach(), output))
    last = net.decoder.conv_out.weight
    if game == "hinge":
        generator = -seen.mean()
        other = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    else:
        generator = -torch.sigmoid(seen).log().mean()
        other = -0.5 * (torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (error, generator)]
    adaptive = (norms[0] / norms[1]).clamp(max=bound)
    return error + 1e-2 * kl + adaptive * weight * generator, other, adaptive


@pytest.mark.parametrize(("game", "name"), [(Hinge(), "hinge"), (NonSaturating(), "non-saturating")])
def test_one_step_is_two_steps_of_plain_torch(game, name):
    ours = stage(lambda d: Adversarial(d, 0.5, game))
    net, discriminator = copy.deepcopy(ours.net), copy.deepcopy(ours.terms[2].discriminator)
    rates = (1e-5, 1e-2)
    groups = [
        {"params": m.parameters(), "lr": lr} for m, lr in zip((ours.net, ours.terms), rates, strict=True)
    ]
    one = torch.optim.SGD(groups, momentum=0.9)
    two = [
        torch.optim.SGD(m.parameters(), lr, momentum=0.9)
        for m, lr in zip((net, discriminator), rates, strict=True)
    ]
    before = copy.deepcopy(ours)
    for _ in range(3):
        one.zero_grad()
        values = loss_of(ours)
        values["loss"].backward()
        one.step()
        first, second, adaptive = plain_losses(net, discriminator, 0.5, name)
        found = [
            torch.autograd.grad(loss, list(m.parameters()))
            for loss, m in ((first, net), (second, discriminator))
        ]
        for module, gradients, player in zip((net, discriminator), found, two, strict=True):
            for weight, gradient in zip(module.parameters(), gradients, strict=True):
                weight.grad = gradient
            player.step()
        assert torch.allclose(values["adversarial_weight"], adaptive, rtol=1e-5)
        assert torch.allclose(values["adversarial_discriminator"], second, rtol=1e-5)
    pairs = (
        (ours.net, net, before.net),
        (ours.terms[2].discriminator, discriminator, before.terms[2].discriminator),
    )
    for module, plain, start in pairs:
        now, then, first = (
            torch.nn.utils.parameters_to_vector(m.parameters()) for m in (module, plain, start)
        )
        assert (now - then).abs().max() < 1e-6
        assert (now - first).abs().max() > 1e-3


def test_each_players_loss_reaches_its_own_weights_only():
    ours = stage(lambda d: Adversarial(d, game=NonSaturating()))
    term, outputs = ours.terms[2], {"image": batch()["image"].flip(0).requires_grad_()}
    term(batch(), outputs).sum().backward()
    assert outputs["image"].grad.abs().sum() > 0
    assert not grads(term)
    outputs["image"].grad = None
    term.own_loss(batch(), outputs).sum().backward()
    assert outputs["image"].grad is None
    assert all(grad.abs().sum() > 0 for grad in grads(term).values())
    assert len(grads(term)) == len(list(term.parameters()))


def test_before_its_start_a_term_costs_nothing_and_leaves_its_parameters_alone():
    ours, plain = stage(lambda d: Adversarial(d, start=100)), stage()
    plain.net.load_state_dict(ours.net.state_dict())
    values = loss_of(ours)
    assert "adversarial" not in values
    values["loss"].backward()
    loss_of(plain)["loss"].backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(ours.net.parameters(), plain.net.parameters(), strict=True)
    )
    assert all(p.grad is not None and not p.grad.any() for p in ours.terms.parameters())  # for all processes
    ours.on_before_optimizer_step(None)
    assert not grads(ours.terms)


def test_a_ramp_grows_from_0_to_the_weight():
    term = L1(weight=2.0, start=100, ramp=200)
    found = []
    for samples in (0, 100, 150, 300, 1000):
        term.at(samples)
        found.append(term.scale if term.is_active else None)
    assert found == [None, 0.0, 0.5, 2.0, 2.0]


def test_the_adaptive_weight_is_bounded_and_the_loss_does_not_contain_it():
    ours = stage(lambda d: Adversarial(d, max_adaptive=3.0))
    values = loss_of(ours)
    values["loss"].backward()
    assert values["adversarial_weight"] == 3.0
    expected = values["reconstruction"] + 1e-2 * values["kl"]
    assert torch.allclose(values["loss"], expected, rtol=1e-6)
    fixed = stage(lambda d: Adversarial(d, max_adaptive=None))
    values = loss_of(fixed)
    assert "adversarial_weight" not in values
    expected = values["reconstruction"] + 1e-2 * values["kl"] + 0.5 * values["adversarial"]
    assert torch.allclose(values["loss"], expected, rtol=1e-6)


def test_two_games_are_balanced_each_by_itself():
    both = stage(*(lambda d, i=i: Adversarial(d, name=f"game{i}") for i in range(2)))
    one = stage(lambda d: Adversarial(d, name="game0"))
    one.load_state_dict({k: v for k, v in both.state_dict().items() if not k.startswith("terms.3.")})
    ours, alone = loss_of(both), loss_of(one)
    for values in (ours, alone):
        values["loss"].backward()
    assert torch.allclose(ours["game0_weight"], alone["game0_weight"], rtol=1e-6)
    assert ours["game1_weight"] > 0 and ours["game1_weight"] != ours["game0_weight"]


def test_a_loss_of_the_discriminator_that_is_not_finite_makes_the_loss_so():
    ours = stage(lambda d: Adversarial(d))
    with torch.no_grad():
        ours.terms[2].discriminator.main[-1].bias.fill_(float("nan"))
    assert not loss_of(ours)["loss"].isfinite()


def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns():
    ours = stage(lambda d: Adversarial(d), frozen=["encoder"])
    loss_of(ours)["loss"].backward()
    trained = {name.split(".")[1] for name in grads(ours) if name.startswith("net.")}
    assert trained == {"decoder", "post_quant_conv"}
    assert {name.split(".")[1] for name in ours.averaged_parameters()} == trained
    with pytest.raises(
        ValueError, match=r"model\.frozen: got encoder and decoder, .* nothing is left to train"
    ):
        stage(frozen=["encoder", "decoder"])


def test_the_variance_is_learned_as_published():
    """nll = error / exp(logvar) + logvar for each value of an image (Rombach et al.'s program)."""
    torch.manual_seed(0)
    data, output = batch(), torch.rand(4, 3, 16, 16, requires_grad=True)
    term = LearnedVariance([L1()], initial=0.3)
    found = term(data, {"image": output})
    expected = ((data["image"] - output).abs() / torch.exp(term.log_scale) + term.log_scale).sum((1, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-5)
    found.sum().backward()
    assert term.log_scale.grad.abs() > 0 and output.grad.abs().sum() > 0
    assert term.names == ("nll", "log_scale", "reconstruction")
    ours = stage(lambda d: Adversarial(d), reconstruction=term)
    directions = {"loss", "nll", "reconstruction", "kl"}
    assert {name for name in ours.higher_is_better if "psnr" not in name} == directions


def test_the_variance_is_of_errors_that_need_no_training():
    class Projected(L1):
        def __init__(self):
            super().__init__(name="projected")
            self.projector = torch.nn.Linear(3, 3)

    judge = Adversarial(PatchGAN(8, 2, norm_groups=4))
    for term, found in [(judge, "an adaptive weight"), (Projected(), "parameters of its own")]:
        name = f"{term.name} ({type(term).__name__})"
        with pytest.raises(
            ValueError, match=rf"model\.reconstruction: .*{re.escape(name)}, which has {found}"
        ):
            LearnedVariance([L1(), term])


def test_the_variance_is_of_an_error_that_is_there_from_the_start():
    with pytest.raises(ValueError, match=r"got terms: reconstruction from 32, expected one without start"):
        LearnedVariance([L1(start=32)])
    with pytest.raises(ValueError, match=r"got terms: none, expected one"):
        LearnedVariance([])
    term, output = LearnedVariance([L1(), L2(start=32, name="late")]), torch.zeros(4, 3, 16, 16)
    errors = []
    for samples in (31, 32):
        term.at(samples)
        errors.append(term(batch(), {"image": output}))  # ln s is 0: the errors themselves
    assert torch.allclose(errors[1] - errors[0], batch()["image"].square().sum((1, 2, 3)))


def test_r1_is_half_the_squared_gradient_of_the_image():
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 4)
    image = torch.randn(2, 3, 4, 4, requires_grad=True)
    logits = (image * weight).sum((1, 2, 3))[:, None]
    assert torch.allclose(R1()(image, logits, logits), 0.5 * weight.square().sum().expand(2))


def test_lecam_pulls_logits_to_the_averages_of_the_other_side():
    term = LeCam(decay=0.5)
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[-1.0], [-2.0]])
    assert term(None, real, fake).tolist() == [0.0, 0.0]  # nothing to compare with yet
    term.on_step()
    assert term.averages.tolist() == [1.0, -0.75]  # half of the means 2 and -1.5
    found = term(None, real, fake)  # against 2 and -1.5, without the bias of the first step
    assert torch.allclose(found, torch.tensor([2.5**2 + 3.0**2, 4.5**2 + 4.0**2]))
    term(None, real * float("nan"), fake)
    term.on_step()
    assert term.averages.isfinite().all()


def test_regularizers_reach_the_discriminator_alone():
    plain, ours = (stage(lambda d, r=r: Adversarial(d, regularizers=r)) for r in ([], [R1(10.0), LeCam()]))
    for module in (plain, ours):
        loss_of(module)["loss"].backward()
    for one, two in zip(plain.net.parameters(), ours.net.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    pairs = zip(plain.terms.parameters(), ours.terms.parameters(), strict=True)
    assert any(not torch.equal(one.grad, two.grad) for one, two in pairs)


def test_in_bfloat16_the_adaptive_weight_is_that_of_float32_but_for_rounding():
    data = batch()

    def adaptive(dtype):
        ours = stage(lambda d: Adversarial(d, regularizers=[R1()]))
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            values = loss_of(ours, data)
        values["loss"].backward()
        assert all(grad.isfinite().all() for grad in grads(ours).values())
        assert values["adversarial_weight"].dtype == torch.float32
        return values["adversarial_weight"]

    assert torch.allclose(adaptive(torch.bfloat16), adaptive(torch.float32), rtol=0.05)
