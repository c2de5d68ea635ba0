"""How one job comes by the memory that it needs: what was planned for it, and what is tried when that was not enough."""

from __future__ import annotations

import logging

from diffusion_api.engine.denoise import Evaluate, Lane, Painter, Point, Run
from diffusion_api.engine.devices import Device
from diffusion_api.engine.estimate import TILE, Measures, Rung, rungs
from diffusion_api.engine.plan import plan
from diffusion_api.engine.weights import Weights
from diffusion_api.schema.request import Request

log = logging.getLogger(__name__)

CACHES = "caches freed"


class Ladder:
    """The measures of one job. Each is taken once, in the order of ``estimate.RUNGS``; ``steps`` says which, and when."""

    def __init__(self, request: Request, weights: Weights, device: Device) -> None:
        self._request, self._weights, self._device = request, weights, device
        self._planned = self._forced = Measures()
        self.steps: list[str] = []
        weights.begin()

    @property
    def measures(self) -> Measures:
        """Those in force."""
        return self._planned.joined(self._forced)

    def load(self, name: str) -> Lane | Painter:
        """A model, with room for this job beside it. Raises what :meth:`Weights.load` raises."""
        lane = self._weights.load(name, self._request, self._forced)
        before = self.measures.names
        self._planned = self._planned.joined(self._weights.measures)
        self.steps += [f"planned: {name}" for name in self.measures.names if name not in before]
        return lane

    def climb(self, question: Evaluate | Run) -> bool:
        """Take the next measure that helps what ran out of memory there; False when none is left.

        The first is to let go of what other jobs left behind.
        """
        point = question.point
        if not any(step.endswith(CACHES) for step in self.steps):
            self._weights.free()
            return self._took(point, CACHES)
        for rung in rungs(self._device.room):
            wanted = self.measures.joined(rung.measure)
            if wanted != self.measures and self._helps(rung, question):
                self._forced = self._forced.joined(rung.measure)
                self._weights.take(self.measures)
                return self._took(point, rung.name)
        return False

    def _helps(self, rung: Rung, question: Evaluate | Run) -> bool:
        measure = rung.measure
        if measure.tiling:
            return question.point in (Point.DECODE, Point.PAINT) and any(
                max(p.width, p.height) > TILE for p in plan(self._request)
            )
        if measure.slicing:
            return question.point in (Point.EVALUATE, Point.PAINT)
        if measure.singly:
            return isinstance(question, Evaluate) and len(question.conditionings) > 1
        return True

    def _took(self, point: Point, name: str) -> bool:
        log.warning("out of memory (%s): %s", point, name)
        self.steps.append(f"{point}: {name}")
        return True
