"""The training of a UNet and its text encoders, together and from nothing (epsilon, scaled_linear)."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from demo_models.autoencoder import Latents
from demo_models.models import MODELS, NOISE_SCHEDULE, DemoModel
from demo_models.network import Network
from demo_models.run import Run, cosine_tail
from demo_models.scenes import BUCKETS, Scene, Size, caption, caption_chunks, held_out

RATE = 1e-3
PREVIEW = (
    "a large red circle on a blue background", "a small green star on a black background on the left",
    "a large yellow ring on a purple background", "a large white cross on an orange background",
    "a small blue triangle on a white background on the right", "a large black square on a yellow background",
    "a small orange ring on a green background", "purple triangle, white background",
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """Scenes and their whitened latents by size, and the autoencoder that turns latents into pictures."""

    scenes: dict[Size, list[Scene]]
    latents: Latents
    vae: AutoencoderKL


def train(run: Run, network: Network, material: Material, steps: int) -> Network:
    """Train on to ``steps`` from where the checkpoint is; the moving average of the weights."""
    model = network.model
    if model.texts_of:
        _take_texts(run, network, model.texts_of)
    ema = network.average()
    parameters, averages = network.parameters(), ema.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    first = 0
    if state := run.load(model.checkpoint):
        network.load(state)
        ema.load(state, "ema_")
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    alphas = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod
    sizes = list(BUCKETS)
    allowed = {
        size: torch.tensor([i for i, s in enumerate(material.scenes[size]) if not held_out(s)]) for size in sizes
    }
    average, started = 0.0, time.monotonic()
    for step in range(first, steps):
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        size = rng.choices(sizes, [BUCKETS[s][2 if step < 0.6 * steps else 3] for s in sizes])[0]
        pick = allowed[size][torch.randint(len(allowed[size]), (BUCKETS[size][1],), generator=generator)]
        chunks = caption_chunks([material.scenes[size][i] for i in pick.tolist()], rng)
        zeroed = [not any(words) and rng.random() < model.blank for words in zip(*chunks, strict=True)]
        z, time_ids = framed(model, material.latents[size][pick], generator)
        calm = step < 0.6 * steps
        x, target, t = noised(z, alphas[: model.timesteps], generator, false_signal=not calm)
        weight = emphasis(t, alphas, most=20 if calm else 200).to(run.device)
        with run.autocast():
            conditioning = network.conditioning(chunks, time_ids, zeroed)
            x = x.to(run.device, memory_format=torch.channels_last)
            predicted = network.predict(x, t.to(run.device), conditioning)
        error = predicted.float() - target.to(run.device)
        loss = (error.square() * weight).mean() + misplaced(error, t, alphas)
        optimizer.param_groups[0]["lr"] = RATE * cosine_tail(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
        run.say(model.name, step, steps, started, first, loss=average)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {**network.state(), **ema.state("ema_"), "optimizer": optimizer.state_dict(), "step": step + 1}
            run.save(model.checkpoint, state)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            preview(run, ema, material, step + 1)
    return ema


def _take_texts(run: Run, network: Network, name: str) -> None:
    """Fill the text encoders with the averaged ones of another model, and train them no further."""
    state = run.load(next(m.checkpoint for m in MODELS if m.name == name))
    if state is None:
        raise SystemExit(f"{network.model.name} takes the text encoder of {name}: train that first")
    for text in network.model.texts:
        network.parts[text.key].load_state_dict(state[f"ema_{text.key}"])
        network.parts[text.key].requires_grad_(False)


def framed(model: DemoModel, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Latents and the time ids that say how the picture was made (Podell et al. 2023, section 2.2, arXiv:2307.01952).

    One batch in ten is a part of its pictures, so that the place of the crop has a meaning. The pictures were drawn larger
    than they are, and all are equally good: sizes and scores vary, and a model learns to draw the same with any of them.
    """
    if not model.time_ids:
        return z, None
    batch, _, height, width = z.shape
    top = left = 0
    if min(height, width) >= 16 and torch.rand((), generator=generator) < 0.1:
        cut = min(height, width) // 16 * 4
        top, left = torch.randint(cut + 1, (2,), generator=generator).tolist()
        z = z[:, :, top : top + height - cut, left : left + width - cut]
    drawn = torch.rand(batch, 1, generator=generator) < 0.5
    larger = torch.where(drawn, 1 + 3 * torch.rand(batch, 1, generator=generator), 1.0)
    values = {
        "original": (torch.tensor([[height * 8.0, width * 8.0]]) * larger).round(),
        "crop": torch.tensor([[top * 8.0, left * 8.0]]).expand(batch, 2),
        "target": torch.tensor([[z.shape[2] * 8.0, z.shape[3] * 8.0]]).expand(batch, 2),
        "score": 1 + 8 * torch.rand(batch, 1, generator=generator),
    }
    return z, torch.cat([values[name] for name in model.time_ids], 1)


def noised(
    z: Tensor, alphas: Tensor, generator: torch.Generator, *, false_signal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, the epsilon to predict, and timesteps.

    scaled_linear leaves sqrt(alpha_bar) = 0.068 of the signal at t = 999: enough for a network to read a flat colour off a
    large picture, and a place too, which pure noise at sampling time does not carry (Lin et al. 2024, arXiv:2305.08891). It
    then takes the noise's word for it, not the prompt's. So most of the noisiest samples carry less of their signal or none,
    and, with ``false_signal``, some carry another picture's, with the target that still leads to the right one.
    """
    batch, timesteps = len(z), len(alphas)
    t = torch.randint(0, timesteps, (batch,), generator=generator)
    high = torch.randint(timesteps * 7 // 10, timesteps, (batch,), generator=generator)
    t = torch.where(torch.rand(batch, generator=generator) < 0.45, high, t)
    noise = torch.randn(z.shape, generator=generator)
    a = alphas[t].view(-1, 1, 1, 1)
    hide = (torch.rand(batch, generator=generator) * 2).clamp(max=1)  # all of it for half of them
    hide = hide * (torch.rand(batch, generator=generator) < 0.75) * (t > 820)
    false = (torch.rand(batch, generator=generator) < 0.3 * false_signal) & (t > 880)
    hide = torch.where(false, 1.0, hide).view(-1, 1, 1, 1)
    other = z.roll(1, 0) * false.view(-1, 1, 1, 1)
    noise = noise + (a / (1 - a)).sqrt() * (other - hide * z)
    return a.sqrt() * z + (1 - a).sqrt() * noise, noise, t


def misplaced(error: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    """How wrong the noisiest samples are about what is where, as a share of the loss.

    The error of epsilon, (batch, 4, h, w), as one of the picture, averaged over blocks of half the height and a quarter of the
    width: noise goes, and what stays is which colours are up, down, left and right. Without it a network whose upper layers see
    no words takes very long to learn sides.
    """
    deep = t > 820
    if not deep.any():
        return error.new_zeros(())
    signal = (alphas[t[deep]] / (1 - alphas[t[deep]])).sqrt().view(-1, 1, 1, 1)
    picture = error[deep.to(error.device)] / signal.to(error.device)
    height, width = picture.shape[2:]
    return 0.03 * torch.nn.functional.avg_pool2d(picture, (height // 2, width // 4)).square().mean()


def emphasis(t: Tensor, alphas: Tensor, *, most: float) -> Tensor:
    """How much each sample's error counts, (batch, 1, 1, 1), 1 on average.

    In the loss of epsilon an error of the picture counts alpha_bar / (1 - alpha_bar): next to nothing where shape and place are
    decided. 1 / alpha_bar makes up for it (the loss of v: Salimans, Ho 2022, arXiv:2202.00512). Half of the whole goes to the
    noisy samples, which decide what is drawn, and half to the others, which decide how well. ``most`` keeps the noisiest from
    having all the say while nothing is known yet.
    """
    weight = (1 / alphas[t]).clamp(max=most)
    noisy = t >= 600
    for part in (noisy, ~noisy):
        if part.any():
            weight[part] /= weight[part].sum()
    return (weight * len(t) / 2).view(-1, 1, 1, 1)


@torch.no_grad()
def preview(run: Run, network: Network, material: Material, step: int) -> None:
    """A picture of what the averaged weights draw now, at 64, 128 and 256 pixels.

    A model of the last timesteps alone polishes drawings with a rough surface, which stand above its own.
    """
    model, count = network.model, len(PREVIEW)
    rows = []
    for side in (64, 128, 256):
        scheduler = EulerDiscreteScheduler(**NOISE_SCHEDULE)
        scheduler.set_timesteps(16 * 1000 // model.timesteps)
        begin = sum(int(t) >= model.timesteps for t in scheduler.timesteps)
        scheduler.set_begin_index(begin)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(count, 4, side // 8, side // 8, generator=generator) * scheduler.sigmas[begin]
        prompts = list(PREVIEW)
        if begin:
            rough = material.latents[(side, side)][:count] + 0.3 * torch.randn(x.shape, generator=generator)
            rows.append(_strip(material.vae, rough.to(run.device)))
            x = x + rough
            prompts = [caption(scene, random.Random(0)) for scene in material.scenes[(side, side)][:count]]
        x = x.to(run.device)
        conditioning = network.conditioning(
            [[""] * count + prompts],
            typical_time_ids(model, side, 2 * count),
            [model.blank > 0] * count + [False] * count,
        )
        for t in scheduler.timesteps[begin:]:
            with run.autocast():
                model_input = scheduler.scale_model_input(torch.cat([x, x]), t)
                without, with_text = network.predict(model_input, t, conditioning).float().chunk(2)
            x = scheduler.step(without + 5 * (with_text - without), t, x).prev_sample
        rows.append(_strip(material.vae, x))
    name = model.checkpoint.removesuffix(".pt").replace("unet", "preview")
    Image.fromarray(np.concatenate(rows, 0)).save(run.work / f"{name}_{step:05}.png")


def typical_time_ids(model: DemoModel, side: int, batch: int) -> Tensor | None:
    """What a pipeline says by default: a whole square picture of the size it has, and a score of 6."""
    if not model.time_ids:
        return None
    values = {"original": [side, side], "crop": [0, 0], "target": [side, side], "score": [6]}
    return torch.tensor([[float(v) for name in model.time_ids for v in values[name]]]).expand(batch, -1)


def _strip(vae: AutoencoderKL, x: Tensor) -> np.ndarray:
    y = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
    strip = ((y.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).round().astype("uint8")
    strip = np.concatenate(list(strip), 1)
    return np.asarray(Image.fromarray(strip).resize((len(y) * 160, 160), Image.Resampling.NEAREST))
