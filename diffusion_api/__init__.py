"""Diffusion API: a job-queue REST service for image generation on one GPU box."""

__version__ = "0.1.0"
