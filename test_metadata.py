"""``diffusion-api test-metadata``, under the name that it had in the original."""

from diffusion_api.cli import script

if __name__ == "__main__":
    script(__file__)
