"""Are the samplers those of k-diffusion, and what does the loop around the model cost?

Parity: each sampler and its reference (``tests/references.py``: k-diffusion's own function, or one written from the paper)
draw a picture with the shipped model, guidance 4, from the same noise, in single precision; PSNR of the decoded pictures.
The table goes into ``docs/samplers.md``. Overhead: processor time of a pass less that of its calls of the model, as a share of
the latter; the shipped model at 128 pixels is the worst case, as it is tiny. An SDE sampler is also timed at 512.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from results import write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import references
from asking import request
from sampling import THEIRS, Model, psnr, sample, theirs

from diffusion_api.catalog import samplers
from diffusion_api.engine import denoise, devices
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.engine.plan import plan
from diffusion_api.engine.samplers.sigmas import spacing
from diffusion_api.settings import DATA

PAGE = Path(__file__).parent.parent / "docs" / "samplers.md"
PROMPT, GUIDANCE, SIZE = "a large red circle on a blue background", 4, 64
SCHEDULES, STEPS = ("default", "karras", "exponential"), (8, 20, 50)
TIMED = ("euler", "euler_a", "dpmpp_2m", "heun", "unipc", "dpmpp_2m_sde", "dpmpp_sde")
SMALL: dict[str, object] = {"steps": 20}
LARGE: dict[str, object] = {"steps": 4, "width": 512, "height": 512}


def main() -> None:
    torch.set_num_threads(1)
    lane = SD1.from_folder(DATA / "models" / "shapes", devices.choose("cpu"))
    with torch.inference_mode():
        overhead = {name: _overhead(lane, name, 5, SMALL) for name in TIMED}
        large = _overhead(lane, "dpmpp_2m_sde", 3, LARGE)
        decibels = {row.name: _decibels(lane, row) for row in samplers.SAMPLERS}
    lowest = min(min(row) for table in decibels.values() for row in table.values())
    write(
        "samplers",
        {
            "lowest_db": lowest,
            "overhead_percent": overhead,
            "overhead_percent_sde_512": large,
            "psnr_db": decibels,
            "steps": STEPS,
        },
    )
    page = PAGE.read_text("utf-8")
    shown = f"<!-- figures -->\n{figures(decibels, overhead, large)}\n<!-- /figures -->"
    PAGE.write_text(re.sub(r"<!-- figures -->.*<!-- /figures -->", shown, page, flags=re.DOTALL), "utf-8")


def figures(decibels: dict[str, dict[str, Sequence[int]]], overhead: dict[str, float], large: float) -> str:
    """What stands in ``docs/samplers.md``."""
    lines = ["| sampler | reference | default | Karras | exponential |", "|---|---|---|---|---|"]
    for name, by_schedule in decibels.items():
        cells = [" / ".join(map(str, by_schedule[s])) if s in by_schedule else "the same" for s in SCHEDULES]
        reference = "k-diffusion" if name in THEIRS else "paper"
        lines.append(f"| {samplers.sampler(name).label} | {reference} | {' | '.join(cells)} |")
    costs = ", ".join(f"{samplers.sampler(name).label} {share} %" for name, share in overhead.items())
    lines += [
        "",
        f"All that is not the model costs, of the model's processor time at 128 pixels: {costs} (512 pixels: {large} %).",
    ]
    return "\n".join(lines)


def _decibels(lane: SD1, row: samplers.Sampler) -> dict[str, list[int]]:
    """By schedule, for each number of steps."""
    (positive,), (negative,) = lane.encode((PROMPT,)), lane.encode(("",), negative=True)

    def both(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        scaled = (x / (sigma**2 + 1) ** 0.5).float()
        rows = lane.predict(scaled.expand(2, -1, -1, -1), lane.levels.timestep(sigma), [negative, positive])
        without, predicted = rows[:1].to(x.dtype), rows[1:].to(x.dtype)
        return lane.levels.estimate(x, sigma, without + (predicted - without) * GUIDANCE), without

    def guided(x: Tensor, sigma: float) -> Tensor:
        return both(x, sigma)[0]

    def unguided(x: Tensor, sigma: float) -> Tensor:
        return lane.levels.estimate(x, sigma, both(x, sigma)[1])

    def picture(latents: Tensor) -> Tensor:
        return lane.decode(latents.float()).clamp(-1, 1)

    def compared(schedule: str, steps: int) -> int:
        sigmas = spacing(lane.levels, row.name, schedule, steps)
        start = torch.randn(lane.latent_shape(SIZE, SIZE), generator=torch.Generator().manual_seed(1)) * sigmas[0]
        ours = sample(row.name, Model(guided, unguided), start, sigmas)
        if row.name in THEIRS:
            other = theirs(row.name, guided, start, sigmas, **({"eta": 1.0} if row.ends_only else {}))
        else:
            other = references.PAPERS[row.name](guided, unguided, start, sigmas, references.Noises(start))
        return min(round(psnr(picture(ours), picture(other))), 120)

    known = {}
    for schedule in SCHEDULES[:1] if row.ends_only else SCHEDULES:
        known[schedule] = [compared(schedule, steps) for steps in STEPS]
        print(f"{row.label} {schedule}: {known[schedule]}", flush=True)
    return known


def _overhead(lane: SD1, sampler: str, runs: int, fields: dict[str, object]) -> float:
    """Percent of the time that the model takes, the median of so many runs."""
    return round(statistics.median(_share(lane, sampler, fields) for _ in range(runs)), 2)


def _share(lane: SD1, sampler: str, fields: dict[str, object]) -> float:
    (stage,) = plan(request(PROMPT, sampler=sampler, **fields))
    asks = denoise.denoised(denoise.Seat(lane), stage, lambda progress: None, lambda: None)
    answer, inside, began = None, 0.0, None
    while True:
        try:
            question = asks.send(answer)
        except StopIteration:
            break
        asked = time.thread_time()
        if isinstance(question, denoise.Run):
            answer = question.work()
            continue
        began = asked if began is None else began
        rows = question.latents.expand(len(question.conditionings), -1, -1, -1)
        answer = lane.predict(rows, question.timestep, question.conditionings, question.extra)
        inside += time.thread_time() - asked
    assert began
    return 100 * (time.thread_time() - began - inside) / inside


if __name__ == "__main__":
    main()
