"""The training of the models that ship with Diffusion API; ``train_demo_models.py`` runs it."""
