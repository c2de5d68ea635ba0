"""``diffusion-api example-metadata-usage``, under its name in the original; the code is in diffusion_api/examples.py."""

from diffusion_api.cli import script

if __name__ == "__main__":
    script(__file__)
