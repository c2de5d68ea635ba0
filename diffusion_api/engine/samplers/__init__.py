"""Samplers as generators over sigmas, in k-diffusion's variance-exploding terms (Karras et al. 2022, arXiv:2206.00364).

A sampler gets ``x`` (1, c, h, w) float32 = clean + sigma * noise, and falling ``sigmas`` that end with 0 (or, for DDIM,
above it). ``denoised = yield from denoise(x, sigma)`` asks the model; ``noise()`` draws from the image's own generator. It
returns ``x`` at the last sigma.
"""

from __future__ import annotations

from diffusion_api.engine.samplers.base import Sampler
from diffusion_api.engine.samplers.dpmpp import dpmpp_2m
from diffusion_api.engine.samplers.euler import ddim, euler, euler_ancestral, heun

SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "ddim": ddim,
}
"""By the names of :mod:`diffusion_api.catalog.samplers`."""
