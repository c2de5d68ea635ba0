"""Train the tiny diffusion models that ship with Diffusion API.

The models draw flat scenes, ``a large red circle on a blue background on the left``, so that every feature of the
service can be tested by looking at what it makes. Everything is seeded; interrupted runs resume from ``--work``.

    python scripts/train_demo_models.py --clip-vocabulary bpe_simple_vocab_16e6.txt.gz --work .train

Stages, each skipped when its result is already in the work folder:

    tokenizer   a CLIPTokenizer whose vocabulary and merges are a subset of CLIP's own
    scenes      drawn pictures in several sizes, kept in memory
    vae         AutoencoderKL, 8x down, 4 channels; whitened afterwards so that SD 1's scaling factor 0.18215 is right
    latents     the scenes, encoded
    unet        UNet2DConditionModel and CLIPTextModel, trained together from nothing (epsilon, scaled_linear)
    export      the diffusers folder, fp16 safetensors
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import random
import time
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 220, 50),
    "purple": (150, 60, 190), "orange": (250, 140, 30), "black": (20, 20, 20), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZE_WORDS = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}
SIDE_PHRASES = {
    "left": ("on the left", "on the left", "on the left side", "left", "to the left"),
    "right": ("on the right", "on the right", "on the right side", "right", "to the right"),
    "middle": ("in the middle", "in the center", "centered", "in the centre"),
}
FILLERS = (
    "masterpiece best quality highly detailed photo of beautiful simple drawing picture image illustration digital art "
    "sharp focus high resolution hd uhd 4k 8k absurdres artwork concept trending on artstation cinematic lighting studio "
    "soft light dramatic scene professional realistic photograph portrait landscape style painting oil canvas watercolor "
    "sketch anime cartoon minimal clean flat vector graphic design logo icon geometric shape colorful vivid bright dark "
    "blurry low bad worst ugly distorted deformed noise grainy watermark text signature cropped jpeg artifacts nice pretty "
    "amazing stunning great epic a an the with and very one single solid plain paper wall poster cat dog girl man woman "
    "house tree forest mountain river city night day sun sky sea cloud flower car face eyes hair smile old new young"
).split()

# (width, height): pictures drawn, batch size, weight in the mix at the start and after 30 % of the run. Words are learnt
# fastest on small pictures; a coarse shape is all that 64 px can show.
BUCKETS = {
    (64, 64): (9000, 48, 0.45, 0.12), (96, 96): (4000, 24, 0.20, 0.12), (128, 128): (5000, 16, 0.25, 0.34),
    (192, 128): (1200, 8, 0.01, 0.05), (128, 192): (1200, 8, 0.01, 0.05), (192, 192): (1500, 6, 0.04, 0.12),
    (256, 256): (2000, 4, 0.04, 0.20),
}  # fmt: skip

VAE_CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=8, sample_size=256,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[16, 32, 64, 64], scaling_factor=0.18215,
)  # fmt: skip
UNET_CONFIG = dict(
    sample_size=32, in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=128, attention_head_dim=8,
    norm_num_groups=16, block_out_channels=[64, 64, 128, 128],
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
)  # fmt: skip
NOISE_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


# ---------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    side: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


def random_scene(rng: random.Random) -> Scene:
    first, second, background = rng.sample(list(COLOURS), 3)
    if rng.random() < 0.12:
        left, right = (Thing("small", c, rng.choice(SHAPES), s) for c, s in ((first, "left"), (second, "right")))
        return Scene((left, right), background)
    side = rng.choice(("left", "right", "middle", "middle"))
    return Scene((Thing(rng.choice(("small", "large")), first, rng.choice(SHAPES), side),), background)


def plain(scene: Scene) -> str:
    """The caption of a one-object scene in its plain form."""
    thing = scene.things[0]
    side = "" if thing.side == "middle" else f" on the {thing.side}"
    return f"a {thing.size} {thing.colour} {thing.shape} on {_a(scene.background)} background{side}"


def held_out(scene: Scene) -> bool:
    """True for one scene in sixteen, which no caption of the training ever describes: tests ask for these."""
    return len(scene.things) == 1 and zlib.crc32(plain(scene).encode()) % 16 == 0


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """The scene at the given size in pixels, anti-aliased. Large is 60-75 % of the shorter side, small 30-40 %."""
    k = 4 if max(width, height) <= 96 else 2
    image = Image.new("RGB", (width * k, height * k), COLOURS[scene.background])
    pen = ImageDraw.Draw(image)
    short = min(width, height)
    for thing in scene.things:
        r = short * (rng.uniform(0.15, 0.20) if thing.size == "small" else rng.uniform(0.30, 0.375))
        margin = r + 0.02 * short
        if thing.side == "middle":
            cx = width * rng.uniform(0.47, 0.53)
        else:
            cx = max(margin, width * rng.uniform(0.22, 0.29))
            cx = cx if thing.side == "left" else width - cx
        cy = height * 0.5 + (height * 0.5 - margin) * rng.uniform(-0.4, 0.4)
        _pen_shape(pen, thing.shape, cx * k, cy * k, r * k, COLOURS[thing.colour])
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _pen_shape(
    pen: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, fill: tuple[int, int, int]
) -> None:
    box = (cx - r, cy - r, cx + r, cy + r)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle((cx - 0.9 * r, cy - 0.9 * r, cx + 0.9 * r, cy + 0.9 * r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(cx, cy - r), (cx - r, cy + 0.9 * r), (cx + r, cy + 0.9 * r)], fill=fill)
    elif shape == "star":
        spikes = [(r if i % 2 == 0 else r * 0.45, i * math.pi / 5) for i in range(10)]
        pen.polygon([(cx + d * math.sin(a), cy - d * math.cos(a)) for d, a in spikes], fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(2, int(r * 0.36)))
    else:
        pen.rectangle((cx - r, cy - r * 0.32, cx + r, cy + r * 0.32), fill=fill)
        pen.rectangle((cx - r * 0.32, cy - r, cx + r * 0.32, cy + r), fill=fill)


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to say the scene; a caption may leave out what it does not care about."""
    if len(scene.things) == 2:
        left, right = (_noun(t, rng, side=True, article=True) for t in scene.things)
        first, second = (left, right) if rng.random() < 0.7 else (right, left)
        return _dress(f"{first} and {second} on a {scene.background} background", rng)
    thing = scene.things[0]
    form = rng.random()
    if form < 0.55:
        side = _side(thing, rng)
        text = f"{_noun(thing, rng, article=True)} on {_a(scene.background)} background{side}"
    elif form < 0.67:
        text = f"{_noun(thing, rng)} on {scene.background} background{_side(thing, rng)}"
    elif form < 0.77:
        parts = [f"{thing.colour} {thing.shape}", f"{scene.background} background", rng.choice(SIZE_WORDS[thing.size])]
        rng.shuffle(parts)
        text = ", ".join(parts) + _side(thing, rng)
    elif form < 0.85:
        text = f"{scene.background} background with {_noun(thing, rng, article=True)}{_side(thing, rng)}"
    elif form < 0.92:
        text = f"{_a(thing.colour)} {thing.shape} on {_a(scene.background)} background{_side(thing, rng)}"
    elif form < 0.97:
        text = _noun(thing, rng, article=True) + _side(thing, rng)
    else:
        text = f"{thing.colour} {thing.shape}"
    return _dress(text, rng)


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _noun(thing: Thing, rng: random.Random, *, side: bool = False, article: bool = False) -> str:
    word = thing.size if rng.random() < 0.7 else rng.choice(SIZE_WORDS[thing.size])
    text = f"{word} {thing.colour} {thing.shape}" + (_side(thing, rng).replace(",", "") if side else "")
    return f"a {text}" if article else text


def _side(thing: Thing, rng: random.Random) -> str:
    if thing.side == "middle" and rng.random() < 0.75:
        return ""
    return rng.choice((" ", " ", ", ")) + rng.choice(SIDE_PHRASES[thing.side])


def _dress(text: str, rng: random.Random) -> str:
    dice = rng.random()
    if dice < 0.18:
        return text + ", " + filler(rng, rng.randint(1, 8))
    if dice < 0.28:
        return filler(rng, rng.randint(1, 6)) + ", " + text
    if dice < 0.33:
        return filler(rng, rng.randint(8, 45)) + ", " + text
    if dice < 0.36:
        return text + ", " + filler(rng, rng.randint(8, 45))
    return text + ("." if dice > 0.97 else "")


def filler(rng: random.Random, count: int) -> str:
    """Words that mean nothing to the model, some of them unknown ones that fall apart into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [
        "".join(rng.choices(letters, k=rng.randint(2, 6))) if rng.random() < 0.06 else rng.choice(FILLERS)
        for _ in range(count)
    ]
    return "".join(w + rng.choice((" ", " ", ", ")) for w in words).strip(" ,")


# ------------------------------------------------------------------------------------------------------- tokenizer


def clip_tables(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """CLIP's vocabulary in id order and its merges in rank order, from the published ``bpe_simple_vocab_16e6.txt.gz``."""
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(c) for c in printable]
    symbols += [chr(256 + i) for i in range(256 - len(printable))]
    vocabulary = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
    return [*vocabulary, "<|startoftext|>", "<|endoftext|>"], merges  # type: ignore[return-value]


def subset_tables(
    vocabulary: list[str], merges: list[tuple[str, str]], words: set[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """The part of CLIP's tables that ``words`` need: they split exactly as with the whole, others fall into letters."""
    rank = {pair: i for i, pair in enumerate(merges)}
    used: set[tuple[str, str]] = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while pairs := [p for p in pairwise(parts) if p in rank]:
            best = min(pairs, key=rank.__getitem__)
            used.add(best)
            merged: list[str] = []
            while parts:
                if len(parts) > 1 and (parts[0], parts[1]) == best:
                    merged.append("".join(best))
                    parts = parts[2:]
                else:
                    merged.append(parts.pop(0))
            parts = merged
    kept = sorted(used, key=rank.__getitem__)
    return [*vocabulary[:512], *("".join(m) for m in kept), *vocabulary[-2:]], kept


def caption_words() -> set[str]:
    words = {*COLOURS, *SHAPES, *FILLERS, *",.", "a", "an", "on", "with", "and", "background"}
    for phrases in (*SIZE_WORDS.values(), *SIDE_PHRASES.values()):
        words.update(w for p in phrases for w in p.split())
    return {w for w in words if not any(c.isdigit() for c in w)}


def save_tokenizer(folder: Path, vocabulary: list[str], merges: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = dict(
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------- training


class Run:
    """The work folder, and a line of progress every few seconds."""

    def __init__(self, work: Path, device: str) -> None:
        self.work, self.device = work, device
        work.mkdir(parents=True, exist_ok=True)
        self._last = 0.0

    def say(self, stage: str, step: int, steps: int, started: float, first: int, **figures: float) -> None:
        now = time.monotonic()
        if now - self._last < 10 and step + 1 < steps:
            return
        self._last = now
        done = max(step + 1 - first, 1)
        left = (now - started) / done * (steps - step - 1)
        text = " ".join(f"{k} {v:.4f}" for k, v in figures.items())
        print(
            f"{stage} {step + 1}/{steps}  {text}  {(now - started) / done:.2f} s/step  {left / 60:.0f} min left",
            flush=True,
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16)


def cosine_tail(step: int, steps: int, *, warmup: int = 100, tail: float = 0.35) -> float:
    """Learning-rate factor: warm up, hold, then fall to nothing over the last ``tail`` of the run."""
    if step < warmup:
        return (step + 1) / warmup
    start = steps * (1 - tail)
    return 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


def draw_all() -> dict[tuple[int, int], tuple[list[Scene], torch.Tensor]]:
    """Scenes and pictures of each bucket: (count, 3, height, width), uint8."""
    out = {}
    for (width, height), (count, *_) in BUCKETS.items():
        rng = random.Random(width * 1000 + height)
        scenes = [random_scene(rng) for _ in range(count)]
        pictures = np.stack([np.asarray(draw(s, width, height, rng)) for s in scenes])
        out[(width, height)] = (scenes, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous())
        print(f"scenes {width}x{height}: {count}", flush=True)
    return out


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float() / 127.5 - 1


def train_vae(run: Run, pools: dict, steps: int) -> AutoencoderKL:
    vae = AutoencoderKL(**VAE_CONFIG).to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0)
    path, first = run.work / "vae.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
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
            _save(path, dict(vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1))
    return vae.eval()


def _save(path: Path, state: dict) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


@torch.no_grad()
def encode_all(run: Run, vae: AutoencoderKL, pools: dict) -> dict[tuple[int, int], torch.Tensor]:
    path = run.work / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
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
    _save(path, latents)
    return latents


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: dict[tuple[int, int], torch.Tensor], scaling_factor: float) -> dict:
    """Fold a per-channel shift and scale into the 1x1 convolutions, so that ``scaling_factor * latent`` is N(0, 1).

    Afterwards the published scaling factor of the family is the right one, and a single-file checkpoint needs no config.
    """
    flat = torch.cat([z[:800].permute(1, 0, 2, 3).reshape(4, -1) for z in latents.values()], 1)
    shift, spread = flat.mean(1), flat.std(1)
    gain = 1 / (spread * scaling_factor)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift.to(post.bias)
    post.weight /= gain.view(1, 4, 1, 1).to(post.weight)
    quant.weight[:4] *= gain.view(4, 1, 1, 1).to(quant.weight)
    quant.bias[:4] = ((quant.bias[:4].cpu() - shift) * gain).to(quant.bias)
    return {size: (z - shift.view(1, 4, 1, 1)) / spread.view(1, 4, 1, 1) for size, z in latents.items()}


class Captions:
    """Captions → token ids, (batch, 77) or, for long prompts, (batch, 2, 77)."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: list[str]) -> torch.Tensor:
        return self._tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids

    def batch(self, scenes: list[Scene], rng: random.Random) -> torch.Tensor:
        texts = ["" if rng.random() < 0.1 else caption(s, rng) for s in scenes]
        if rng.random() > 0.08:
            return self.ids(texts)[:, None]
        rest = ["" if rng.random() < 0.5 else filler(rng, rng.randint(3, 40)) for _ in texts]
        pair = [self.ids(texts), self.ids(rest)]
        return torch.stack(pair if rng.random() < 0.5 else pair[::-1], 1)


def embed(text_encoder: CLIPTextModel, ids: torch.Tensor) -> torch.Tensor:
    """(batch, chunks, 77) token ids → (batch, chunks * 77, width): every chunk is encoded alone, then joined."""
    batch, chunks, length = ids.shape
    hidden = text_encoder(ids.reshape(batch * chunks, length)).last_hidden_state
    return hidden.reshape(batch, chunks * length, -1)


def new_text_encoder(vocabulary_size: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary_size, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=128, hidden_act="quick_gelu",
        bos_token_id=vocabulary_size - 2, eos_token_id=vocabulary_size - 1, pad_token_id=vocabulary_size - 1,
    )  # fmt: skip
    return CLIPTextModel(config)


def train_unet(
    run: Run, pools: dict, latents: dict, captions: Captions, vocabulary_size: int, steps: int, vae: AutoencoderKL
):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET_CONFIG).to(run.device, memory_format=torch.channels_last)
    text_encoder = new_text_encoder(vocabulary_size).to(run.device)
    ema = (copy.deepcopy(unet).eval(), copy.deepcopy(text_encoder).eval())
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    averages = [*ema[0].parameters(), *ema[1].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    path, first = run.work / "unet.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        for model, key in ((unet, "unet"), (text_encoder, "text"), (ema[0], "ema_unet"), (ema[1], "ema_text")):
            model.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    alphas = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod
    sizes = list(BUCKETS)
    allowed = {size: torch.tensor([i for i, s in enumerate(pools[size][0]) if not held_out(s)]) for size in sizes}
    average, started = 0.0, time.monotonic()
    for step in range(first, steps):
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        size = rng.choices(sizes, [BUCKETS[s][2 if step < 0.3 * steps else 3] for s in sizes])[0]
        pick = allowed[size][torch.randint(len(allowed[size]), (BUCKETS[size][1],), generator=generator)]
        z = latents[size][pick]
        ids = captions.batch([pools[size][0][i] for i in pick.tolist()], rng)
        x, target, t = noised(z, alphas, generator)
        # On a CPU the fused attention's backward pass is slow for heads this narrow, until the pictures get large.
        unet.set_attn_processor(
            AttnProcessor() if run.device == "cpu" and size[0] * size[1] < 256 * 256 else AttnProcessor2_0()
        )
        with run.autocast():
            hidden = embed(text_encoder, ids.to(run.device))
            x = x.to(run.device, memory_format=torch.channels_last)
            predicted = unet(x, t.to(run.device), hidden).sample
        loss = F.mse_loss(predicted.float(), target.to(run.device))
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine_tail(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
        run.say("unet", step, steps, started, first, loss=average)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            _save(path, dict(
                unet=unet.state_dict(), text=text_encoder.state_dict(), ema_unet=ema[0].state_dict(),
                ema_text=ema[1].state_dict(), optimizer=optimizer.state_dict(), step=step + 1,
            ))  # fmt: skip
        if (step + 1) % 500 == 0 or step + 1 == steps:
            preview(run, *ema, vae, captions, step + 1)
    return ema


def noised(
    z: torch.Tensor, alphas: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noised latents, the epsilon to predict, and timesteps.

    scaled_linear leaves sqrt(alpha_bar) = 0.068 of the signal at t = 999: enough for a network to read a flat colour off a
    large picture, which pure noise at sampling time does not carry (Lin et al. 2024, arXiv:2305.08891). So part of the
    noisiest samples carry less of their signal, with the target that still leads to the right picture.
    """
    batch = len(z)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    high = torch.randint(500, 1000, (batch,), generator=generator)
    t = torch.where(torch.rand(batch, generator=generator) < 0.45, high, t)
    noise = torch.randn(z.shape, generator=generator)
    a = alphas[t].view(-1, 1, 1, 1)
    hide = torch.rand(batch, generator=generator) * (torch.rand(batch, generator=generator) < 0.6) * (t > 850)
    noise = noise - hide.view(-1, 1, 1, 1) * (a / (1 - a)).sqrt() * z
    return a.sqrt() * z + (1 - a).sqrt() * noise, noise, t


PREVIEW = (
    "a large red circle on a blue background", "a small green star on a black background on the left",
    "a large yellow ring on a purple background", "a large white cross on an orange background",
    "a small blue triangle on a white background on the right", "a large black square on a yellow background",
    "a small orange ring on a green background", "purple triangle, white background",
)  # fmt: skip


@torch.no_grad()
def preview(
    run: Run, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL, captions: Captions, step: int
) -> None:
    """A picture of what the averaged weights draw now, at 64, 128 and 256 pixels."""
    both = embed(text_encoder, captions.ids([""] * len(PREVIEW) + list(PREVIEW))[:, None].to(run.device))
    rows = []
    for size in (64, 128, 256):
        scheduler = EulerDiscreteScheduler(**NOISE_SCHEDULE)
        scheduler.set_timesteps(16)
        x = torch.randn(len(PREVIEW), 4, size // 8, size // 8, generator=torch.Generator().manual_seed(1)).to(
            run.device
        )
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            with run.autocast():
                model_input = scheduler.scale_model_input(torch.cat([x, x]), t)
                without, with_text = unet(model_input, t, both).sample.float().chunk(2)
            x = scheduler.step(without + 5 * (with_text - without), t, x).prev_sample
        y = vae.decode(x / VAE_CONFIG["scaling_factor"]).sample.clamp(-1, 1)
        strip = ((y.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).round().astype("uint8")
        strip = np.concatenate(list(strip), 1)
        rows.append(np.asarray(Image.fromarray(strip).resize((len(PREVIEW) * 160, 160), Image.Resampling.NEAREST)))
    Image.fromarray(np.concatenate(rows, 0)).save(run.work / f"preview_{step:05}.png")


# ---------------------------------------------------------------------------------------------------------- export


def export(folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL, tables) -> None:
    """Write the diffusers folder, fp16, with the tensor names that the published SD 1 folders have."""
    save_tokenizer(folder / "tokenizer", *tables)
    for name, model in (("unet", unet), ("vae", vae)):
        model.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(folder / name)
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor.half().contiguous().cpu()
        for name, tensor in text_encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    (folder / "text_encoder").mkdir(exist_ok=True)
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    config = {**text_encoder.config.to_dict(), "architectures": ["CLIPTextModel"], "dtype": "float16"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {
        "_class_name": "PNDMScheduler", **NOISE_SCHEDULE, "prediction_type": "epsilon", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False, "trained_betas": None,
    }  # fmt: skip
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0", "feature_extractor": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip-vocabulary", type=Path, required=True, help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--work", type=Path, default=Path(".train"), help="checkpoints and previews")
    parser.add_argument(
        "--out", type=Path, default=Path("diffusion_api/data/models/shapes"), help="the folder to write"
    )
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--unet-steps", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    run = Run(options.work, options.device)
    vocabulary, merges = clip_tables(options.clip_vocabulary)
    tables = subset_tables(vocabulary, merges, caption_words())
    save_tokenizer(run.work / "tokenizer", *tables)
    captions = Captions(CLIPTokenizer.from_pretrained(run.work / "tokenizer"))
    print(f"tokenizer: {len(tables[0])} of {len(vocabulary)} tokens")
    pools = draw_all()
    vae = train_vae(run, pools, options.vae_steps)
    latents = whiten(vae, encode_all(run, vae, pools), VAE_CONFIG["scaling_factor"])
    unet, text_encoder = train_unet(run, pools, latents, captions, len(tables[0]), options.unet_steps, vae)
    export(options.out, unet, text_encoder, vae, tables)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
