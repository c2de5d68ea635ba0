"""Loading of models, one kept at a time."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from diffusion_api.catalog.library import Library, Model
from diffusion_api.engine.denoise import Lane
from diffusion_api.engine.devices import Device, is_out_of_memory
from diffusion_api.engine.families.base import read_tensors
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.errors import ModelUnreadable, OutOfMemory, UnknownModel

log = logging.getLogger(__name__)

LONGEST_REASON = 300
"""Characters of what a library says of a file; some list every tensor."""


class Weights:
    """The model in memory; asking for another one replaces it."""

    def __init__(self, library: Library, device: Device, tokenizer: Path) -> None:
        self._library, self._device, self._tokenizer = library, device, tokenizer
        self._loaded: tuple[Model, Lane] | None = None
        self.hit = False
        """Whether the model that was asked for last was in memory already."""

    def load(self, name: str) -> Lane:
        """The lane of that model. Raises ModelUnreadable, OutOfMemory, and UnknownModel when it is no longer listed."""
        model = self._library.find(name)
        if model is None:
            raise UnknownModel(f"model {name!r} {self._library.absence(name)}", field="model")
        self.hit = self._loaded is not None and self._loaded[0] == model
        if self._loaded and self.hit:
            return self._loaded[1]
        self._loaded = None
        self._device.free()
        started = time.monotonic()
        lane = self._read(model)
        self._loaded = (model, lane)
        log.info("loaded model %s (%s) in %.1f s", model.name, model.family, time.monotonic() - started)
        return lane

    def _read(self, model: Model) -> Lane:
        try:
            return self._open(model)
        except Exception as error:  # transformers, diffusers and tokenizers raise anything for a file that is damaged
            if is_out_of_memory(error):
                raise OutOfMemory(
                    f"out of memory while model {model.name!r} was loaded; ask for a smaller one"
                ) from error
            if self._device.lost(error):
                raise
            raise ModelUnreadable(f"model {model.name!r} cannot be read: {_reason(error, model)}") from error

    def _open(self, model: Model) -> Lane:
        if not model.single_file:
            return SD1.from_folder(model.path, self._device, model.hash)
        return SD1.from_checkpoint(read_tensors(model.path), self._tokenizer, self._device, model.hash)


def _reason(error: Exception, model: Model) -> str:
    """One line for callers, with no path of the host."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, OSError) and error.filename:
        path = Path(str(error.filename))
        return f"{path.parent.name}/{path.name}: {error.strerror}"
    text = " ".join(str(error).replace(str(model.path), model.name).split())
    return text[:LONGEST_REASON] or type(error).__name__
