"""The work folder of a training, its progress and its learning rate."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch


class Run:
    """The work folder and its checkpoints, and a line of progress every few seconds."""

    def __init__(self, work: Path, device: str) -> None:
        self.work, self.device = work, device
        work.mkdir(parents=True, exist_ok=True)
        self._last = 0.0

    def say(self, stage: str, step: int, steps: int, started: float, first: int, **figures: float) -> None:
        now = time.monotonic()
        if now - self._last < 10 and step + 1 < steps:
            return
        self._last = now
        done = max(step + 1 - first, 1)
        left = (now - started) / done * (steps - step - 1)
        text = " ".join(f"{k} {v:.4f}" for k, v in figures.items())
        print(
            f"{stage} {step + 1}/{steps}  {text}  {(now - started) / done:.2f} s/step  {left / 60:.0f} min left",
            flush=True,
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16)

    def load(self, name: str) -> dict | None:
        """A checkpoint of the work folder; None when it is not there."""
        path = self.work / name
        return torch.load(path, weights_only=True) if path.exists() else None

    def save(self, name: str, state: dict) -> None:
        """Write a checkpoint whole: an interrupted run leaves the one before."""
        part = self.work / f"{name}.part"
        torch.save(state, part)
        part.replace(self.work / name)


def cosine_tail(step: int, steps: int, *, warmup: int = 100, tail: float = 0.35) -> float:
    """Learning-rate factor: warm up, hold, then fall to nothing over the last ``tail`` of the run."""
    if step < warmup:
        return (step + 1) / warmup
    start = steps * (1 - tail)
    return 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))
