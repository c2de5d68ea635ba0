"""``python -m diffusion_api`` is the command ``diffusion-api``."""

from diffusion_api.cli import main

main()
