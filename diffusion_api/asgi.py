"""The app for uvicorn or gunicorn (one worker process): ``uvicorn diffusion_api.asgi:app``."""

from diffusion_api import settings
from diffusion_api.server import build_app, configure_logging

_settings = settings.load()
configure_logging(_settings)
app = build_app(_settings)
