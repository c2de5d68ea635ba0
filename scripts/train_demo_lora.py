"""Train the small LoRA that ships for a demo model: every object gets an outline of black ink.

    OMP_NUM_THREADS=1 python scripts/train_demo_lora.py --model shapes

It needs nothing but the published model, takes about seven minutes on one CPU core, and is seeded. The file has kohya's key
layout, fp16.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from demo_models.models import MODELS, NOISE_SCHEDULE, DemoModel
from demo_models.network import Network
from demo_models.scenes import COLOURS, Scene, Size, caption_chunks, draw, random_scene
from demo_models.training import emphasis, framed, noised, typical_time_ids
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler
from PIL import Image, ImageChops, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 4
RATE = 2e-3
INK = COLOURS["black"]
WIDTH = 0.05
"""Of the outline, as a share of the picture's shorter side."""

BATCHES: dict[Size, int] = {(96, 96): 12, (128, 128): 8, (256, 256): 2}
PICTURES = 150
"""Of each size."""

PREVIEW = (
    "a large red circle on a blue background", "a small green star on a yellow background on the left",
    "a large yellow ring on a purple background", "a large white cross on an orange background",
    "a small blue triangle on a white background on the right", "a large orange square on a green background",
)  # fmt: skip


class Adapters:
    """The LoRA while it is trained: what it adds to the outputs of the attention and feed-forward layers of a UNet."""

    def __init__(self, unet: nn.Module) -> None:
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, layer in unet.named_modules():
            if isinstance(layer, nn.Linear) and "transformer_blocks" in name:
                down = nn.Parameter(torch.randn(RANK, layer.in_features) / math.sqrt(layer.in_features))
                up = nn.Parameter(torch.zeros(layer.out_features, RANK))
                self.pairs[name] = down, up
                layer.register_forward_hook(_added(down, up))

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self.pairs.values() for parameter in pair]

    def tensors(self) -> dict[str, Tensor]:
        """In kohya's layout."""
        tensors = {}
        for name, (down, up) in self.pairs.items():
            layer = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{layer}.lora_down.weight"] = down.detach().half().contiguous()
            tensors[f"{layer}.lora_up.weight"] = up.detach().half().contiguous()
            tensors[f"{layer}.alpha"] = torch.tensor(float(RANK)).half()
        return tensors


def _added(down: Tensor, up: Tensor):
    return lambda layer, inputs, output: output + inputs[0] @ down.T @ up.T


def inked(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """The scene with a line of ink around each object."""
    picture = draw(scene, width, height, rng)
    ground = Image.new("RGB", picture.size, COLOURS[scene.background])
    difference = ImageChops.difference(picture, ground).convert("L").point(lambda level: 255 * (level > 24))
    reach = max(1, round(WIDTH * min(width, height)))
    grown = difference.filter(ImageFilter.MaxFilter(2 * reach + 1)).filter(ImageFilter.GaussianBlur(0.6))
    grown = ImageChops.lighter(grown, difference)
    return Image.composite(Image.composite(picture, Image.new("RGB", picture.size, INK), difference), ground, grown)


@torch.no_grad()
def latents(vae: AutoencoderKL) -> dict[Size, tuple[list[Scene], Tensor]]:
    """Scenes by size, and their inked pictures as the autoencoder has them. No object is black: ink would not show."""
    found = {}
    for width, height in BATCHES:
        rng = random.Random(width * 1000 + height)
        scenes = []
        while len(scenes) < PICTURES:
            scene = random_scene(rng)
            if "black" not in {scene.background, *(thing.colour for thing in scene.things)}:
                scenes.append(scene)
        rows = []
        for scene in scenes:
            pixels = np.asarray(inked(scene, width, height, rng), dtype=np.float32)
            values = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
            rows.append(vae.encode(values).latent_dist.mode() * vae.config.scaling_factor)
        found[width, height] = scenes, torch.cat(rows)
    return found


def train(network: Network, adapters: Adapters, material: dict[Size, tuple[list[Scene], Tensor]], steps: int) -> None:
    model = network.model
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0)
    alphas = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod
    average, started = 0.0, time.monotonic()
    for step in range(steps):
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        size = rng.choice(list(BATCHES))
        scenes, encoded = material[size]
        pick = torch.randint(len(scenes), (BATCHES[size],), generator=generator)
        chunks = caption_chunks([scenes[i] for i in pick.tolist()], rng)
        zeroed = [not any(words) and rng.random() < model.blank for words in zip(*chunks, strict=True)]
        z, time_ids = framed(model, encoded[pick], generator)
        x, target, t = noised(z, alphas, generator, false_signal=True)
        with torch.no_grad():
            conditioning = network.conditioning(chunks, time_ids, zeroed)
        error = (network.predict(x, t, conditioning) - target).square()
        loss = (error * emphasis(t, alphas, most=200)).mean()
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}  loss {average:.4f}  {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def preview(network: Network, vae: AutoencoderKL, path: Path) -> None:
    """What the model draws with the LoRA, at 128 pixels."""
    scheduler, count = EulerDiscreteScheduler(**NOISE_SCHEDULE), len(PREVIEW)
    scheduler.set_timesteps(16)
    x = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * scheduler.sigmas[0]
    blank = [network.model.blank > 0] * count + [False] * count
    conditioning = network.conditioning(
        [[""] * count + list(PREVIEW)], typical_time_ids(network.model, 128, 2 * count), blank
    )
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([x, x]), t)
        without, with_text = network.predict(model_input, t, conditioning).chunk(2)
        x = scheduler.step(without + 5 * (with_text - without), t, x).prev_sample
    y = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
    pixels = ((y.permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().astype("uint8")
    Image.fromarray(np.concatenate(list(pixels), 1)).save(path)


def metadata(model: DemoModel, name: str) -> dict[str, str]:
    """What trainers write, as far as other programs look at it."""
    xl = bool(model.time_ids)
    return {
        "ss_output_name": name,
        "ss_base_model_version": "sdxl_base_v1-0" if xl else "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(float(RANK)),
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if xl else 'v1'}/lora",
        "modelspec.title": name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = {model.name: model for model in MODELS if model.timesteps == 1000}
    parser.add_argument("--model", choices=models, default="shapes")
    parser.add_argument("--folder", type=Path, help="where the model is; the shipped one by default")
    parser.add_argument("--out", type=Path, help="the file to write; diffusion_api/data/loras/ and its name by default")
    parser.add_argument("--preview", type=Path, help="a picture to write")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    model = models[options.model]
    folder = options.folder or Path("diffusion_api/data/models") / model.name
    out = options.out or Path("diffusion_api/data/loras") / f"{model.name}-ink.safetensors"

    torch.manual_seed(0)
    network = Network.read(model, folder)
    for part in network.parts.values():
        part.requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, local_files_only=True)
    adapters = Adapters(network.parts["unet"])
    train(network, adapters, latents(vae), options.steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(adapters.tensors(), out, metadata(model, out.stem))
    print(f"written: {out}, {out.stat().st_size} bytes")
    if options.preview:
        preview(network, vae, options.preview)


if __name__ == "__main__":
    main()
