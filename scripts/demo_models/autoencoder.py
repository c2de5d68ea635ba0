"""AutoencoderKL, 8x down, 4 channels: its training, the scenes as latents, and their whitening."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from demo_models.run import Run, cosine_tail
from demo_models.scenes import Pools, Size

Latents = dict[Size, torch.Tensor]
"""Whitened or not, (count, 4, height/8, width/8), float32."""

VAE_CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=8, sample_size=256,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[16, 32, 64, 64],
)  # fmt: skip


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float() / 127.5 - 1


def train_vae(run: Run, pools: Pools, steps: int) -> AutoencoderKL:
    """The autoencoder as ``vae.pt`` has it, trained on to ``steps``."""
    vae = AutoencoderKL(**VAE_CONFIG).to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0)
    first = 0
    if state := run.load("vae.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    mix = [((64, 64), 24), ((64, 64), 24), ((128, 128), 8), ((64, 64), 24), ((96, 96), 12), ((192, 192), 3)]
    average, started = 0.0, time.monotonic()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        size, batch = mix[step % len(mix)]
        pool = pools[size][1]
        x = to_float(pool[torch.randint(len(pool), (batch,), generator=generator)]).to(run.device)
        with run.autocast():
            mean = vae.encode(x).latent_dist.mean
            spread = mean.detach().float().std()
            z = mean + torch.randn(mean.shape, generator=generator).to(run.device) * 0.06 * spread
            y = vae.decode(z).sample
        y = y.float()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * mean.float().square().mean()
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine_tail(step, steps, tail=0.7)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == first else 0.95 * average + 0.05 * loss.item()
        run.say("vae", step, steps, started, first, loss=average)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            run.save("vae.pt", dict(vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1))
    return vae.eval()


@torch.no_grad()
def encode_all(run: Run, vae: AutoencoderKL, pools: Pools) -> Latents:
    """The mean latents of all pictures, from ``latents.pt`` when it is there."""
    if latents := run.load("latents.pt"):
        return latents
    latents = {}
    for size, (_, pictures) in pools.items():
        batch = max(1, 64 * 64 * 128 // (size[0] * size[1]))
        with run.autocast():
            parts = [
                vae.encode(to_float(pictures[i : i + batch]).to(run.device)).latent_dist.mean.float().cpu()
                for i in range(0, len(pictures), batch)
            ]
        latents[size] = torch.cat(parts)
        print(f"latents {size[0]}x{size[1]}", flush=True)
    run.save("latents.pt", latents)
    return latents


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Latents, scaling_factor: float) -> Latents:
    """Fold a per-channel shift and scale into the 1x1 convolutions, so that ``scaling_factor * latent`` is N(0, 1).

    Afterwards the published scaling factor of the family is the right one, and a single-file checkpoint needs no config.
    The whitened latents are returned; they are the same whatever the factor.
    """
    flat = torch.cat([z[:800].permute(1, 0, 2, 3).reshape(4, -1) for z in latents.values()], 1)
    shift, spread = flat.mean(1), flat.std(1)
    gain = 1 / (spread * scaling_factor)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift.to(post.bias)
    post.weight /= gain.view(1, 4, 1, 1).to(post.weight)
    quant.weight[:4] *= gain.view(4, 1, 1, 1).to(quant.weight)
    quant.bias[:4] = ((quant.bias[:4].cpu() - shift) * gain).to(quant.bias)
    vae.register_to_config(scaling_factor=scaling_factor)
    return {size: (z - shift.view(1, 4, 1, 1)) / spread.view(1, 4, 1, 1) for size, z in latents.items()}
