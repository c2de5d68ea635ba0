"""The upscalers that need no file, in the order in which users see them."""

from __future__ import annotations

INTERNAL = {
    "Latent": "enlarges the latents, bilinear",
    "Latent (antialiased)": "enlarges the latents, bilinear with antialiasing",
    "Latent (bicubic)": "enlarges the latents, bicubic",
    "Latent (bicubic antialiased)": "enlarges the latents, bicubic with antialiasing",
    "Latent (nearest)": "enlarges the latents, nearest",
    "Latent (nearest-exact)": "enlarges the latents, nearest with exact centres",
    "Lanczos": "enlarges the picture, Lanczos",
    "Nearest": "enlarges the picture, nearest",
    "None": "enlarges the picture as Lanczos does, where it has to",
}
"""Names and what they do."""

LATENT = {
    "Latent": ("bilinear", False),
    "Latent (antialiased)": ("bilinear", True),
    "Latent (bicubic)": ("bicubic", False),
    "Latent (bicubic antialiased)": ("bicubic", True),
    "Latent (nearest)": ("nearest", False),
    "Latent (nearest-exact)": ("nearest-exact", False),
}
"""Those that enlarge latents: how they interpolate, and whether with antialiasing."""
