"""The app for uvicorn or gunicorn (one worker process): ``uvicorn diffusion_api.asgi:app``."""

from diffusion_api import logs, settings
from diffusion_api.server import build_app

_settings = settings.load()
logs.configure(_settings)
app = build_app(_settings)
