"""Noise levels: a model's own table of sigmas, and the spacings over it (``a1111.md`` 3.2)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_api.catalog import samplers

Prediction = Literal["epsilon", "v"]
"""What a model predicts: the noise, or v (Salimans and Ho 2022, arXiv:2202.00512)."""

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
"""By the words of a diffusers scheduler config."""

ALMOST_NOTHING = 4.8973451890853435e-08
"""The share of the picture at the last timestep of a model with zero terminal SNR, where 0 would make its level infinite;
A1111's number."""


class NoiseLevels:
    """The discrete noise levels of a trained model.

    ``sigmas`` rise, (timesteps,) float64: sqrt((1 - alpha_bar) / alpha_bar). ``prediction`` is what the model says of a level.
    ``xl``: of the SDXL family, for which other levels were found to be the best.
    """

    def __init__(self, sigmas: Tensor, *, prediction: Prediction = "epsilon", xl: bool = False) -> None:
        self.sigmas, self.prediction, self.xl = sigmas, prediction, xl
        self._logs: list[float] = sigmas.log().tolist()

    @classmethod
    def from_betas(
        cls, betas: Tensor, *, prediction: Prediction = "epsilon", xl: bool = False, zero_terminal_snr: bool = False
    ) -> NoiseLevels:
        """From the variance that each timestep adds, (timesteps,).

        ``zero_terminal_snr``: moved so that nothing of a picture is left at the last timestep (Lin et al. 2024,
        arXiv:2305.08891, Algorithm 1).
        """
        alphas = torch.cumprod(1 - betas.double(), 0)
        if zero_terminal_snr:
            roots = alphas.sqrt()
            alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
            alphas[-1] = ALMOST_NOTHING
        return cls(((1 - alphas) / alphas).sqrt(), prediction=prediction, xl=xl)

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, xl: bool = False) -> NoiseLevels:
        """From a diffusers scheduler config. Raises ValueError for a kind of schedule or prediction that is not known."""
        start, end = float(str(config.get("beta_start", 0.0001))), float(str(config.get("beta_end", 0.02)))
        count, kind = int(str(config.get("num_train_timesteps", 1000))), config.get("beta_schedule", "linear")
        predicted = str(config.get("prediction_type", "epsilon"))
        if predicted not in PREDICTIONS:
            raise ValueError(f"prediction_type {predicted!r} is not known; one of {', '.join(PREDICTIONS)}")
        if isinstance(trained := config.get("trained_betas"), list):
            betas = torch.tensor(trained, dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float32)
        else:
            raise ValueError(f"beta_schedule {kind!r} is not known; one of scaled_linear, linear")
        zero = bool(config.get("rescale_betas_zero_snr"))
        return cls.from_betas(betas, prediction=PREDICTIONS[predicted], xl=xl, zero_terminal_snr=zero)

    def sigma(self, timestep: float) -> float:
        """The level at a fractional timestep, log-linear between the trained ones."""
        low = min(int(timestep), len(self._logs) - 2)
        part = timestep - low
        return math.exp((1 - part) * self._logs[low] + part * self._logs[low + 1])

    def timestep(self, sigma: float) -> float:
        """The fractional timestep of a level; the inverse of :meth:`sigma`, clamped to the trained range."""
        log = math.log(sigma)
        high = min(max(bisect_left(self._logs, log), 1), len(self._logs) - 1)
        below, above = self._logs[high - 1], self._logs[high]
        part = min(max((log - below) / (above - below), 0.0), 1.0)
        return high - 1 + part

    def estimate(self, x: Tensor, sigma: float, prediction: Tensor) -> Tensor:
        """The clean picture in ``x`` = clean + sigma * noise, from the model's raw prediction for x / sqrt(sigma^2 + 1)."""
        if self.prediction == "v":
            return x / (sigma**2 + 1) - prediction * (sigma / math.sqrt(sigma**2 + 1))
        return x - prediction * sigma

    @property
    def lowest(self) -> float:
        """The smallest trained level."""
        return self.sigmas[0].item()

    @property
    def highest(self) -> float:
        """The largest trained level."""
        return self.sigmas[-1].item()


@dataclass(frozen=True)
class Span:
    """What a spacing is made of. ``low`` and ``high`` are the levels at its ends; ``rho`` 0 is the spacing's own."""

    levels: NoiseLevels
    low: float
    high: float
    rho: float = 0

    def over_time(self, times: Sequence[float]) -> list[float]:
        """The levels at those shares of the way, in timesteps, from ``high`` (0) to ``low`` (1)."""
        first, last = self.levels.timestep(self.high), self.levels.timestep(self.low)
        return [self.levels.sigma(first + (last - first) * share) for share in times]


Spacing = Callable[[Span, int], list[float]]
"""The levels that so many steps go through, highest first."""


def default(span: Span, steps: int) -> list[float]:
    """Timesteps evenly spaced from the model's last to its first, both used (A1111's Uniform)."""
    return [*_uniform(span.levels, steps), 0.0]


def karras(span: Span, steps: int) -> list[float]:
    """Karras et al. 2022, Eq. 5, rho 7."""
    return [*karras_ramp(span.low, span.high, steps, span.rho or 7), 0.0]


def karras_ramp(low: float, high: float, count: int, rho: float = 7) -> list[float]:
    """Levels from ``high`` to ``low`` whose rho-th roots are evenly spaced."""
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return [(top + (bottom - top) * share) ** rho for share in _shares(count)]


def exponential(span: Span, steps: int) -> list[float]:
    """Levels in equal ratios."""
    return polyexponential(Span(span.levels, span.low, span.high), steps)


def polyexponential(span: Span, steps: int) -> list[float]:
    """The logarithm falls as the rho-th power of the way that is left; rho 1."""
    top, bottom = math.log(span.high), math.log(span.low)
    return [*(math.exp(bottom + (top - bottom) * (1 - share) ** (span.rho or 1)) for share in _shares(steps)), 0.0]


def sgm_uniform(span: Span, steps: int) -> list[float]:
    """Timesteps evenly spaced, the last one left out (stability.ai's generative models)."""
    return [*span.over_time(_shares(steps + 1)[:-1]), 0.0]


def normal(span: Span, steps: int) -> list[float]:
    """Timesteps evenly spaced, both ends used; unlike ``default`` it keeps to the ends that a caller gives."""
    return [*span.over_time(_shares(steps)), 0.0]


def kl_optimal(span: Span, steps: int) -> list[float]:
    """Sabour et al. 2024 (arXiv:2404.14507), appendix: arc tangents evenly spaced; ends at ``low``, not at 0."""
    top, bottom = math.atan(span.high), math.atan(span.low)
    return [math.tan(top + (bottom - top) * share) for share in _shares(steps + 1)]


ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
ALIGNED_XL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def align_your_steps(span: Span, steps: int) -> list[float]:
    """Sabour et al. 2024: levels found for 10 steps, log-linear between them for other counts."""
    logs = [math.log(level) for level in (ALIGNED_XL if span.levels.xl else ALIGNED)]
    places = [share * (len(logs) - 1) for share in _shares(steps)]
    return [*(math.exp(_between(logs, place)) for place in places), 0.0]


def simple(span: Span, steps: int) -> list[float]:
    """Every (count / steps)-th trained level from the last one down, none of them twice."""
    sigmas = span.levels.sigmas
    taken = dict.fromkeys(int(i * len(sigmas) / steps) for i in range(steps))
    return [*(sigmas[-1 - i].item() for i in taken), 0.0]


def ddim(span: Span, steps: int) -> list[float]:
    """Every (count // steps)-th timestep from 1 up; where the division leaves a rest, more steps than asked."""
    sigmas = span.levels.sigmas
    return [*reversed(sigmas[1 :: max(len(sigmas) // steps, 1)].tolist()), 0.0]


def pndm(span: Span, steps: int) -> list[float]:
    """As ``ddim``, but as many steps as asked (diffusers' leading spacing)."""
    sigmas = span.levels.sigmas
    return [*reversed(sigmas[1 :: max(len(sigmas) // steps, 1)][:steps].tolist()), 0.0]


BETA = 0.6


def beta(span: Span, steps: int) -> list[float]:
    """Lee et al. 2024 (arXiv:2407.12173): quantiles of the beta distribution with both parameters 0.6."""
    return [*(span.low + (span.high - span.low) * beta_quantile(1 - share) for share in _shares(steps)), 0.0]


def beta_quantile(share: float) -> float:
    """Where the beta distribution with both parameters 0.6 has that share (0 to 1) below, by halving."""
    if share > 0.5:
        return 1 - beta_quantile(1 - share)
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_share(middle) < share else (low, middle)
    return high if share else 0.0


def _beta_share(x: float) -> float:
    """The regularised incomplete beta function at 0 to 0.5, by its power series (Abramowitz and Stegun 1964, 26.5.4)."""
    total, factor = 0.0, 1.0
    for n in range(50):
        total += factor / (BETA + n)
        factor *= (n + 1 - BETA) / (n + 1) * x
    return math.pow(x, BETA) * total * math.gamma(2 * BETA) / math.gamma(BETA) ** 2


def timesteps(span: Span, steps: int) -> list[float]:
    """What DDIM and PLMS run without a schedule: as ``ddim``, but down to the model's lowest level."""
    sigmas = span.levels.sigmas
    count = len(sigmas)
    times = sorted({min(t + 1, count - 1) for t in range(0, count, max(count // steps, 1))}, reverse=True)
    return [*(sigmas[t].item() for t in times), span.levels.lowest]


def leading(span: Span, steps: int) -> list[float]:
    """As ``pndm``, but down to the model's lowest level."""
    return [*pndm(span, steps)[:-1], span.levels.lowest]


def uniform_to_lowest(span: Span, steps: int) -> list[float]:
    """Timesteps evenly spaced, one more than steps, down to the model's lowest level (UniPC's own)."""
    return _uniform(span.levels, steps + 1)


def _uniform(levels: NoiseLevels, count: int) -> list[float]:
    last = len(levels.sigmas) - 1
    return [levels.sigma(last * (1 - share)) for share in _shares(count)]


def _shares(count: int) -> list[float]:
    return [i / max(count - 1, 1) for i in range(count)]


def _between(values: Sequence[float], place: float) -> float:
    low = min(int(place), len(values) - 2)
    return values[low] + (values[low + 1] - values[low]) * (place - low)


SCHEDULES: dict[str, Spacing] = {
    "default": default,
    "karras": karras,
    "exponential": exponential,
    "ddim": ddim,
    "pndm": pndm,
    "polyexponential": polyexponential,
    "sgm_uniform": sgm_uniform,
    "kl_optimal": kl_optimal,
    "align_your_steps": align_your_steps,
    "simple": simple,
    "normal": normal,
    "beta": beta,
}
"""By the names of :mod:`diffusion_api.catalog.samplers`."""


TRAINED: dict[str, Spacing] = {"default": timesteps, "ddim": timesteps, "pndm": leading}
"""Schedules of trained timesteps, for samplers that end at the lowest of them."""


@dataclass(frozen=True)
class Ends:
    """What a caller may change of a spacing; 0 for the model's own levels and the spacing's own rho.

    ``discard_next_to_last_sigma``: one level more is computed, and the last one above 0 left out.
    """

    sigma_min: float = 0
    sigma_max: float = 0
    rho: float = 0
    discard_next_to_last_sigma: bool = False


OWN = Ends()


def spacing(levels: NoiseLevels, sampler: str, schedule: str, steps: int, ends: Ends = OWN) -> list[float]:
    """The sigmas that ``steps`` steps of this sampler go through, highest first."""
    row = samplers.sampler(sampler)
    if row.distilled:
        levels = distilled(levels)
    span = Span(levels, ends.sigma_min or levels.lowest, ends.sigma_max or levels.highest, ends.rho)
    if row.timesteps and schedule in TRAINED:
        return (
            uniform_to_lowest(span, steps)
            if row.name == "unipc" and schedule == "default"
            else TRAINED[schedule](span, steps)
        )
    if row.ends_only:
        return uniform_to_lowest(span, steps)
    if ends.discard_next_to_last_sigma or row.discards_next_to_last:
        sigmas = SCHEDULES[schedule](span, steps + 1)
        return [*sigmas[:-2], sigmas[-1]]
    return SCHEDULES[schedule](span, steps)


DISTILLED_STEPS = 50


def distilled(levels: NoiseLevels) -> NoiseLevels:
    """Every 20th of 1000 levels, the last one included: what latent consistency models are distilled at."""
    stride = max(len(levels.sigmas) // DISTILLED_STEPS, 1)
    return NoiseLevels(levels.sigmas[stride - 1 :: stride])
