"""Train the tiny diffusion models that ship with Diffusion API.

The models draw flat scenes, ``a large red circle on a blue background on the left``, so that every feature of the
service can be tested by looking at what it makes. Everything is seeded; interrupted runs resume from ``--work``.

    python scripts/train_demo_models.py --clip-vocabulary bpe_simple_vocab_16e6.txt.gz --work .train --model shapes

    shapes              the architecture of Stable Diffusion 1
    shapes-xl           the architecture of SDXL base: two text encoders, sizes and crop as a condition
    shapes-xl-refiner   the architecture of the SDXL refiner, with the second text encoder of shapes-xl; train it after that

Stages, each skipped when its result is already in the work folder:

    tokenizer   CLIPTokenizers whose vocabulary and merges are a subset of CLIP's own
    scenes      drawn pictures in several sizes, kept in memory
    vae         AutoencoderKL, whitened afterwards so that the family's published scaling factor is right; for all models
    latents     the scenes, encoded; for all models
    unet        UNet2DConditionModel and text encoders, trained together from nothing (epsilon, scaled_linear)
    export      the diffusers folder, fp16 safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo_models.autoencoder import encode_all, train_vae, whiten
from demo_models.export import export
from demo_models.models import MODELS
from demo_models.network import Network, Tokens
from demo_models.run import Run
from demo_models.scenes import draw_all
from demo_models.tokenizer import caption_words, clip_tables, subset_tables
from demo_models.training import Material, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = {model.name: model for model in MODELS}
    parser.add_argument("--model", choices=models, default="shapes")
    parser.add_argument("--clip-vocabulary", type=Path, required=True, help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--work", type=Path, default=Path(".train"), help="checkpoints and previews")
    parser.add_argument("--out", type=Path, help="the folder to write; diffusion_api/data/models/ and the model's name")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--unet-steps", type=int, help="the model's own number by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = models[options.model]
    out = options.out or Path("diffusion_api/data/models") / model.name

    torch.manual_seed(0)
    run = Run(options.work, options.device)
    vocabulary, merges = clip_tables(options.clip_vocabulary)
    tables = subset_tables(vocabulary, merges, caption_words())
    tokens = Tokens.new(model, tables, run.work)
    print(f"tokenizer: {len(tables[0])} of {len(vocabulary)} tokens")
    pools = draw_all()
    vae = train_vae(run, pools, options.vae_steps)
    latents = whiten(vae, encode_all(run, vae, pools), model.scaling_factor)
    scenes = {size: scenes for size, (scenes, _) in pools.items()}
    torch.manual_seed(0)
    network = Network.new(model, tokens, tables[0], run.device)
    trained = train(run, network, Material(scenes, latents, vae), options.unet_steps or model.steps)
    export(out, trained, vae, tables)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
