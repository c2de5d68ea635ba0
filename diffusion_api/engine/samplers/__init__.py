"""Samplers as generators over sigmas, in k-diffusion's variance-exploding terms (Karras et al. 2022, arXiv:2206.00364).

A sampler gets ``x`` (1, c, h, w) float32 = clean + sigma * noise, and falling ``sigmas`` that end with 0 (or, for DDIM and
its relatives, above it). ``denoised = yield from denoise(x, sigma)`` asks the model; ``noise(sigma, following)`` draws from the
image's own source. It returns ``x`` at the last sigma. A schedule's names and spacings are in
:mod:`diffusion_api.engine.samplers.sigmas`.
"""

from __future__ import annotations

from diffusion_api.engine.samplers.base import Options, Sampler
from diffusion_api.engine.samplers.dpm import dpm_2, dpm_2_ancestral, dpm_adaptive, dpm_fast
from diffusion_api.engine.samplers.dpmpp import (
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2m_sde_heun,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
)
from diffusion_api.engine.samplers.euler import ddim, ddim_cfgpp, euler, euler_ancestral, heun, restart
from diffusion_api.engine.samplers.lcm import lcm
from diffusion_api.engine.samplers.multistep import lms, plms
from diffusion_api.engine.samplers.unipc import unipc

__all__ = ["SAMPLERS", "Options", "Sampler"]

SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpm_2_a": dpm_2_ancestral,
    "dpmpp_2s_a": dpmpp_2s_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": dpmpp_2m_sde_heun,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpm_fast": dpm_fast,
    "dpm_adaptive": dpm_adaptive,
    "lms": lms,
    "restart": restart,
    "ddim": ddim,
    "ddim_cfgpp": ddim_cfgpp,
    "plms": plms,
    "unipc": unipc,
    "lcm": lcm,
}
"""By the names of :mod:`diffusion_api.catalog.samplers`."""
