"""Where noise comes from. Each picture has a stream of its own, so that its noise never depends on company, batch or device.

The sources are those of A1111 (``a1111.md`` 5.1 of the project's specification): ``nv`` is what torch draws on an NVIDIA
GPU, computed anywhere; ``cpu`` is torch's CPU generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from diffusion_api.engine.plan import Pass

Word: TypeAlias = np.uint64
Keys = NDArray[np.uint64]
Doubles = NDArray[np.float64]

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_ROUNDS = 10
_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

_UNIT = 2.0**-32
_TURN = _UNIT * float(np.float32(2 * math.pi))
"""cuRAND's constants: a word as a share of 1, and of a turn in single precision."""

_BLOCK = 2**15
"""Numbers that are computed at a time, so that all that lies between stays near the processor."""


@njit(inline="always")
def philox(one: Word, two: Word, three: Word, four: Word, first: Word, second: Word) -> tuple[Word, Word]:
    """The first two words of Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", 3.3) for the
    four words of a counter and the two of a key; of each the lower half counts.
    """
    for _ in range(_ROUNDS):
        left, right = (one & _LOW) * _MULTIPLIERS[0], (three & _LOW) * _MULTIPLIERS[1]
        one, two = (right >> _HALF) ^ two ^ first, right
        three, four = (left >> _HALF) ^ four ^ second, left
        first, second = first + _STEPS[0], second + _STEPS[1]
    return one & _LOW, two & _LOW


@njit()
def _uniform(keys: Keys, call: Word, shares: Doubles, angles: Doubles) -> None:
    """Fill both, (keys, numbers), with a share of 1 and an angle for each number of a call."""
    none = np.uint64(0)
    for row in range(keys.size):
        first, second = keys[row], keys[row] >> _HALF
        for place in range(shares.shape[1]):
            one, two = philox(call, none, np.uint64(place), none, first, second)
            shares[row, place] = np.uint32(one) * _UNIT + _UNIT / 2
            angles[row, place] = np.uint32(two) * _TURN + _TURN / 2


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
        made = torch.empty((len(seeds), count))
        keys = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64)
        rows = max(_BLOCK // count, 1)
        for row in range(0, len(seeds), rows):
            part = keys[row : row + rows]
            words = np.empty((2, len(part), count))
            _uniform(part, np.uint64(call), *words)
            made[row : row + rows] = _normal(*torch.from_numpy(words))
        return made.reshape(len(seeds), *shape)


def _normal(shares: Tensor, angles: Tensor) -> Tensor:
    """The first of the pair of normal numbers that shares of 1 and angles give (Box and Muller 1958); takes both as room."""
    return shares.log_().mul_(-2).sqrt_().mul_(angles.sin_())


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
