"""Where noise comes from. Each picture has a stream of its own, so that its noise never depends on company, batch or device.

The sources are those of A1111 (``a1111.md`` 5.1 of the project's specification): ``nv`` is what torch draws on an NVIDIA
GPU, computed anywhere; ``cpu`` is torch's CPU generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_api.engine.plan import Pass

Words = NDArray[np.uint64]
"""Values of 32 bits, in 64 so that products fit."""

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEPS = 0x9E3779B9, 0xBB67AE85

_UNIT = 2.0**-32
_TURN = _UNIT * float(np.float32(2 * math.pi))
"""cuRAND's constants: a word as a share of 1, and of a turn in single precision."""


class Stream(Protocol):
    """Standard normal numbers that depend on a seed and on what was drawn before."""

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next ones, float32 on the CPU."""


def philox(counters: Sequence[Words | int], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox 4x32-10 of four counter words (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", 3.3)."""
    one, two, three, four = (np.asarray(word, np.uint64) for word in counters)
    for round_ in range(10):
        first, second = (np.uint64((k + round_ * step) & 0xFFFFFFFF) for k, step in zip(key, _STEPS, strict=True))
        left, right = one * _MULTIPLIERS[0], three * _MULTIPLIERS[1]
        one, two = (right >> _HALF) ^ two ^ first, right & _LOW
        three, four = (left >> _HALF) ^ four ^ second, left & _LOW
    return one, two, three, four


class Nvidia:
    """What ``torch.randn`` draws on an NVIDIA GPU after ``torch.manual_seed(seed)``, to single precision.

    A GPU thread draws each number, with the number of the call and its own place as Philox counter, and takes the first
    of the pair that Box and Muller's way gives. Beyond as many numbers as a GPU has threads (some 60,000 to 270,000) each
    model of GPU draws others; A1111's own ``NV`` and this go on as before.
    """

    def __init__(self, seed: int) -> None:
        self._key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        self._calls = 0

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The numbers of the next call."""
        places = np.arange(math.prod(shape), dtype=np.uint64)
        one, two, _, _ = philox((np.full_like(places, self._calls), 0, places, 0), self._key)
        self._calls += 1
        radius = np.sqrt(-2 * np.log(one * _UNIT + _UNIT / 2))
        return torch.from_numpy((radius * np.sin(two * _TURN + _TURN / 2)).astype(np.float32)).reshape(tuple(shape))


class Cpu:
    """Torch's CPU generator."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next numbers of the generator."""
        return torch.randn(tuple(shape), generator=self._generator, dtype=torch.float32)


SOURCES: dict[str, Callable[[int], Stream]] = {"nv": Nvidia, "cpu": Cpu}
"""By the names of :attr:`diffusion_api.schema.request.Sampling.rng`."""


def streams(stage: Pass, latent_shape: Callable[[int, int], tuple[int, ...]]) -> tuple[Tensor, Callable[[], Tensor]]:
    """The noise that a pass starts from, (1, channels, h, w), and what draws its later noise; all on the CPU.

    A variation is mixed in, the noise of another size is put into the middle, and ENSD gives the later noise another
    seed, as A1111 does each. ``latent_shape`` is that of latents for a width and height in pixels.
    """
    request = stage.request
    source = SOURCES[request.rng]
    stream = source(stage.seed)
    shape = drawn = latent_shape(stage.width, stage.height)
    if request.seed_resize_width:
        drawn = latent_shape(request.seed_resize_width, request.seed_resize_height)
    noise = stream(shape) if drawn == shape else source(stage.seed)(drawn)
    if stage.variation_seed is not None:
        noise = slerp(noise, source(stage.variation_seed)(drawn), request.variation_strength)
    if drawn != shape:
        noise = _pasted(noise, stream(shape))
    later = source(stage.seed + request.ensd) if request.ensd else stream
    return noise, lambda: later(shape)


def drawn(source: str, shape: Sequence[int], seed: int) -> Tensor:
    """The first noise that a seed gives."""
    return SOURCES[source](seed)(shape)


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """From ``one`` (share 0) to ``other`` (1) along the arc between them, column by column of (1, c, h, w); A1111's way.

    Columns that point the same way, or opposite ways, are mixed along the line, where the arc is none.
    """
    rows = 2
    cosine = (one / one.norm(dim=rows, keepdim=True) * (other / other.norm(dim=rows, keepdim=True))).sum(rows, True)
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    arc = sine > 1e-3
    whole = torch.where(arc, sine, 1)
    first = torch.where(arc, ((1 - share) * angle).sin() / whole, 1 - share)
    second = torch.where(arc, (share * angle).sin() / whole, share)
    return first * one + second * other


def _pasted(noise: Tensor, ground: Tensor) -> Tensor:
    """``ground`` with ``noise`` over its middle, or with the middle of ``noise`` where that is larger."""
    source, target = [slice(None)] * 2, [slice(None)] * 2
    for length, room in zip(noise.shape[2:], ground.shape[2:], strict=True):
        offset = (room - length) // 2  # rounded down, so that of an odd excess one row more is cut off at each end
        target.append(slice(max(offset, 0), max(offset, 0) + length + 2 * min(offset, 0)))
        source.append(slice(max(-offset, 0), max(-offset, 0) + length + 2 * min(offset, 0)))
    pasted = ground.clone()
    pasted[tuple(target)] = noise[tuple(source)]
    return pasted
