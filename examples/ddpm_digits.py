"""DDPM on handwritten digits, no framework: ``python -m examples.ddpm_digits``, two minutes on a CPU.

Algorithms 1 and 2 of Ho et al. 2020 (arXiv:2006.11239) on the 1,797 digits of scikit-learn (``ldm[digits]``).
Expected: digits.png, 100 samples of which most can be read, 1.2 to 1.3 times as far from the nearest real
digit as real digits are from their nearest. Far below 1 would be copies; noise is at 3.7.
"""

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ldm.diffusion.guidance import clamped
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.schedule import Linear
from ldm.nets.unet import UNet
from ldm.types import Cond, DenoiserDims

DIGITS = (
    torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
)  # (1797, 1, 8, 8) in [-1, 1]
OBJECTIVE = Objective(Linear(200, 5e-4, 0.1))  # predicts eps; 200 timesteps with 5 times the paper's betas


def train(num_steps: int) -> nn.Module:
    """Learn to predict the noise: Algorithm 1, whose line numbers these are."""
    unet = UNet(DenoiserDims(sample=1), [32, 64], 1, [False, False], norm_groups=8)
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.PolynomialLR(optimizer, num_steps)
    for _ in range(num_steps):
        x0 = DIGITS[torch.randint(len(DIGITS), (64,))]  # 2
        t, noise = OBJECTIVE.draw(x0)  # 3 and 4
        optimizer.zero_grad()
        OBJECTIVE.loss(lambda x_t, t: unet(x_t, t, Cond()), x0, noise, t).mean().backward()  # 5
        optimizer.step()
        decay.step()
    return unet.eval()


@torch.no_grad()
def sample(unet: nn.Module) -> Tensor:
    """Draw (100, 1, 8, 8) in [-1, 1]: Algorithm 2, with x0_hat kept in that range."""
    denoise, sampler = OBJECTIVE.denoiser(lambda x_t, t: unet(x_t, t, Cond())), DDPM()
    return sampler(clamped(denoise), sampler.steps(OBJECTIVE.schedule), torch.randn(100, 1, 8, 8))


def main(num_steps: int = 1000, path: str = "digits.png") -> float:
    """Train, draw, and return the distance from the nearest digit, over the one between digits."""
    drawn = sample(train(num_steps))
    sheet = nn.functional.pad((drawn + 1) * 127.5, (1, 1, 1, 1), value=64).view(10, 10, 10, 10)
    Image.fromarray(sheet.transpose(1, 2).reshape(100, 100).byte().numpy()).resize((600, 600), 0).save(path)
    near = [torch.cdist(images.flatten(1), DIGITS.flatten(1)).sort().values for images in (drawn, DIGITS)]
    return (near[0][:, 0].mean() / near[1][:, 1].mean()).item()  # a digit is its own nearest


if __name__ == "__main__":
    print(f"distance from the nearest digit, over the one between digits: {main():.2f}")
