"""What is done about pictures that a safety checker flags. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, ImageFilter

from diffusion_api.engine.base import Pixels
from diffusion_api.errors import ModelUnreadable, NoChecker, UnsafePicture
from diffusion_api.schema.request import Policy, Request, Sampling

Applied: TypeAlias = Literal["off", "blur", "refuse"]

BLURRED = 6
"""The longer side of a picture, divided by this, is the sigma of its blur: spots of colour are left."""

NONE_INSTALLED = "no safety checker is installed"
NO_PREVIEWS = "preview_every is ignored: no picture is shown before it was checked"
REFUSED = "the safety checker flagged a picture, and this service refuses such; another prompt or seed may do"


def enforced(policy: Policy, load: Callable[[], object | None]) -> tuple[Applied, tuple[str, ...]]:
    """What a policy comes to with the checker that ``load`` gives, None where there is none, and what its caller should know.

    Where nothing can be checked, ``blur`` does nothing, and neither does ``refuse`` where no checker is installed. Raises
    NoChecker, and ModelUnreadable for one that is broken.
    """
    if policy == "off":
        return "off", ()
    try:
        found = load() is not None
    except ModelUnreadable as error:
        if policy != "blur":
            raise
        return "off", (f"no picture was checked: {error}",)
    if found:
        return "blur" if policy == "blur" else "refuse", ()
    if policy == "required":
        raise NoChecker(NONE_INSTALLED)
    return "off", (f"no picture was checked: {NONE_INSTALLED}",)


def unseen(request: Request, applied: Applied) -> tuple[Request, tuple[str, ...]]:
    """The request without previews, where a picture is checked before it is seen, and what its caller should know."""
    if applied == "off" or not isinstance(request, Sampling) or not request.preview_every:
        return request, ()
    return request.model_copy(update={"preview_every": 0}), (NO_PREVIEWS,)


def shown(pixels: Pixels, flagged: bool, applied: Applied) -> Pixels:
    """A picture as it may be seen. Raises UnsafePicture."""
    if not flagged or applied == "off":
        return pixels
    if applied == "refuse":
        raise UnsafePicture(REFUSED)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(max(pixels.shape[:2]) / BLURRED)))
