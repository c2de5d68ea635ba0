"""Where noise comes from. Each picture has a stream of its own, so that its noise never depends on company, batch or device.

The sources are those of A1111 (``a1111.md`` 5.1 of the project's specification): ``nv`` is what torch draws on an NVIDIA
GPU, computed anywhere; ``cpu`` is torch's CPU generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
_ROUNDS = np.arange(10, dtype=np.uint64)
_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

_UNIT = 2.0**-32
_TURN = _UNIT * float(np.float32(2 * math.pi))
"""cuRAND's constants: a word as a share of 1, and of a turn in single precision."""

_BLOCK = 2**15
"""Numbers that are computed at a time, so that all that lies between stays near the processor."""


def philox(counters: Sequence[Words | int], key: Sequence[Words | int]) -> tuple[Words, Words]:
    """The first two words of Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", 3.3).

    The four words of a counter and the two of a key may be arrays of many, which are broadcast. In their first rounds they
    are still small: what a word does not depend on yet is computed once.
    """
    one, two, three, four = (np.asarray(word, np.uint64) for word in counters)
    keys = (
        np.add.outer(_ROUNDS * step, np.asarray(word, np.uint64)) & _LOW for step, word in zip(_STEPS, key, strict=True)
    )
    for first, second in zip(*keys, strict=True):
        left, right = one * _MULTIPLIERS[0], three * _MULTIPLIERS[1]
        one, two = (right >> _HALF) ^ two ^ first, right & _LOW
        three, four = (left >> _HALF) ^ four ^ second, left & _LOW
    return one, two


class Nvidia:
    """What ``torch.randn`` draws on an NVIDIA GPU after ``torch.manual_seed(seed)``, to single precision.

    A GPU thread draws each number, with the number of the call and its own place as Philox counter, and takes the first
    of the pair that Box and Muller's way gives. Beyond as many numbers as a GPU has threads (some 60,000 to 270,000) each
    model of GPU draws others; A1111's own ``NV`` and this go on as before.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._calls = seed, 0

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The numbers of the next call."""
        self._calls += 1
        return self._drawn((self._seed,), shape, self._calls - 1)[0]

    @classmethod
    def firsts(cls, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        """What the first call gives for each of the seeds, computed together; (seeds, *shape)."""
        return cls._drawn(seeds, shape, 0)

    @staticmethod
    def _drawn(seeds: Sequence[int], shape: Sequence[int], call: int) -> Tensor:
        count = math.prod(shape)
        made = np.empty((len(seeds), count), np.float32)
        keys = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64)[:, None]
        rows = max(_BLOCK // count, 1)
        for row in range(0, len(seeds), rows):
            for place in range(0, count, _BLOCK):
                part = made[row : row + rows, place : place + _BLOCK]
                places = np.arange(place, place + part.shape[1], dtype=np.uint64)
                key = keys[row : row + rows]
                part[:] = _normal(*philox((call, 0, places, 0), (key & _LOW, key >> _HALF)))
        return torch.from_numpy(made).reshape(len(seeds), *shape)


def _normal(one: Words, two: Words) -> NDArray[np.float64]:
    """The first of the pair of normal numbers that two uniform words give (Box and Muller 1958)."""
    radius = np.multiply(one, _UNIT, dtype=np.float64)
    radius += _UNIT / 2
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    angle = two * _TURN
    angle += _TURN / 2
    turned = torch.from_numpy(angle)
    torch.sin(turned, out=turned)
    radius *= angle
    return radius


class Cpu:
    """Torch's CPU generator."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next numbers of the generator."""
        return torch.randn(tuple(shape), generator=self._generator, dtype=torch.float32)

    @classmethod
    def firsts(cls, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        """What each of the seeds gives first, (seeds, *shape)."""
        return torch.stack([cls(seed)(shape) for seed in seeds])


SOURCES: dict[str, type[Nvidia | Cpu]] = {"nv": Nvidia, "cpu": Cpu}
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
