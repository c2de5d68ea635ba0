"""Loading of models, one kept at a time."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import safetensors
from safetensors.torch import load_file

from diffusion_api.catalog.library import Library, Model
from diffusion_api.engine.denoise import Lane
from diffusion_api.engine.devices import Device
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.errors import ModelUnreadable, UnknownModel

log = logging.getLogger(__name__)

BROKEN = (OSError, ValueError, KeyError, RuntimeError, StopIteration, safetensors.SafetensorError)
"""What transformers, diffusers and safetensors raise for a file that is not what it says."""


class Weights:
    """The model in memory; asking for another one replaces it."""

    def __init__(self, library: Library, device: Device, tokenizer: Path) -> None:
        self._library, self._device, self._tokenizer = library, device, tokenizer
        self._loaded: tuple[Model, Lane] | None = None

    def load(self, name: str) -> Lane:
        """The lane of that model. Raises ModelUnreadable, and UnknownModel when it has gone from the folder."""
        model = self._library.find(name)
        if model is None:
            raise UnknownModel(f"model {name!r} is no longer installed", field="model")
        if self._loaded and self._loaded[0] == model:
            return self._loaded[1]
        self._loaded = None
        started = time.monotonic()
        lane = self._read(model)
        self._loaded = (model, lane)
        log.info("loaded model %s (%s) in %.1f s", model.name, model.family, time.monotonic() - started)
        return lane

    def _read(self, model: Model) -> Lane:
        try:
            return self._open(model)
        except BROKEN as error:
            log.warning("model %s cannot be read", model.name, exc_info=True)
            reason = (str(error).replace(str(model.path), model.name).splitlines() or [type(error).__name__])[0]
            raise ModelUnreadable(f"model {model.name!r} cannot be read: {reason}") from error

    def _open(self, model: Model) -> Lane:
        if model.single_file:
            return SD1.from_checkpoint(load_file(model.path), self._tokenizer, self._device, model.hash)
        return SD1.from_folder(model.path, self._device, model.hash)
