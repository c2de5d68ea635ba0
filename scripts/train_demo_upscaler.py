"""Train the small 2x upscaler that ships with Diffusion API: Real-ESRGAN's Compact architecture, on drawn scenes.

    python scripts/train_demo_upscaler.py

Seeded; about ten minutes on one core. Writes diffusion_api/data/upscalers/shapes-2x.safetensors.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from demo_models.run import cosine_tail
from demo_models.scenes import draw, random_scene
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
from torch import Tensor
from torch.nn.functional import mse_loss

SIDE = 256
PATCH = 40
BATCH = 16
SHRINKERS = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
RATE = 1e-3


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """Scenes at half size and at full size, (count, 3, h, w), uint8."""
    rng = random.Random(7)
    small, large = [], []
    for _ in range(count):
        picture = _tinted(draw(random_scene(rng), SIDE, SIDE, rng), rng)
        large.append(np.asarray(picture))
        small.append(np.asarray(picture.resize((SIDE // 2, SIDE // 2), rng.choice(SHRINKERS))))
    return _stacked(small), _stacked(large)


def _tinted(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture with its channels in another order and range, so that it is edges that are learnt and no colours."""
    channels = list(picture.split())
    rng.shuffle(channels)
    low, high = sorted((rng.uniform(0, 255), rng.uniform(0, 255)))
    if rng.random() < 0.5:
        low, high = 0, 255
    return Image.merge("RGB", [c.point([round(low + (high - low) * i / 255) for i in range(256)]) for c in channels])


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def batch(small: Tensor, large: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Patches that have an edge in them, mostly: flat ones teach nothing."""
    chosen = []
    while len(chosen) < BATCH:
        i, top, left = (rng.randrange(n) for n in (len(small), small.shape[2] - PATCH, small.shape[3] - PATCH))
        low = small[i, :, top : top + PATCH, left : left + PATCH]
        if low.float().std() > 8 or rng.random() < 0.1:
            high = large[i, :, 2 * top : 2 * (top + PATCH), 2 * left : 2 * (left + PATCH)]
            if rng.random() < 0.5:
                low, high = low.transpose(1, 2), high.transpose(1, 2)
            chosen.append((low, high))
    lows, highs = zip(*chosen, strict=True)
    return torch.stack(lows).float() / 255, torch.stack(highs).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=Path("diffusion_api/data/upscalers/shapes-2x.safetensors"))
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    small, large = pairs(400)
    model = SRVGGNetCompact(num_feat=24, num_conv=6, upscale=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99))
    started, average = time.monotonic(), 0.0
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = RATE * cosine_tail(step, options.steps, tail=0.6)
        low, high = batch(small, large, rng)
        loss = mse_loss(model(low), high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"{step + 1}/{options.steps}  loss {average:.6f}  {time.monotonic() - started:.0f} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
