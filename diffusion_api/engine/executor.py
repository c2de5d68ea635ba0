"""The device thread: it owns the device, answers what running jobs ask for, and sends their events."""

from __future__ import annotations

import contextvars
import functools
import logging
import queue
import threading
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_api.catalog.library import Library
from diffusion_api.engine.base import (
    Admission,
    Event,
    Finished,
    Pictures,
    Stop,
    StopAsked,
    no_pictures,
    out_of_memory,
)
from diffusion_api.errors import DeviceLost, DeviceUnusable, DiffusionApiError, Interrupted, OutOfMemory
from diffusion_api.prompt import parse
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.report import DeviceReport, HeldModel
from diffusion_api.schema.request import Policy, Request, Sampling, Txt2Img, model_of, policy_for
from diffusion_api.settings import keep_offline

if TYPE_CHECKING:
    from diffusion_api.canvas import Canvas
    from diffusion_api.engine.denoise import Asks, Evaluate, Run
    from diffusion_api.engine.devices import Device
    from diffusion_api.engine.estimate import Measures
    from diffusion_api.engine.extras import Extras
    from diffusion_api.engine.ladder import Ladder
    from diffusion_api.engine.safety import Checker
    from diffusion_api.engine.weights import Weights

log = logging.getLogger(__name__)

LOST = "the device failed and works no more until the service starts again; the log has the details"


@dataclass(frozen=True)
class Budget:
    """What the operator says of memory: the most bytes of a card and of RAM, the seconds after which models that nobody
    uses leave it, and the models that are there from the start. None: as the machine has it, never.
    """

    max_vram: int | None = None
    max_ram: int | None = None
    idle: float | None = None
    warm_up: tuple[str, ...] = ()


UNLIMITED = Budget()


@dataclass
class Task:
    """One job on the device, the way its events leave, and what the log knows of it where it was made."""

    request: Request
    canvas: Canvas | None
    stop: StopAsked
    events: queue.SimpleQueue[Event | Exception] = field(default_factory=queue.SimpleQueue)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def next_event(self) -> Event:
        """Wait for the next event; an error of the job is raised."""
        event = self.events.get()
        if isinstance(event, Exception):
            raise event
        return event


class Executor:
    """The engine that runs diffusers models; satisfies :class:`diffusion_api.engine.base.Engine`.

    Everything heavy is imported on the device thread, so that the API answers while torch loads.
    """

    def __init__(
        self,
        library: Library,
        *,
        device: str,
        tokenizer: Path,
        budget: Budget = UNLIMITED,
        picture: Pictures = no_pictures,
        policy: Policy = "off",
    ) -> None:
        self._picture, self._policy = picture, policy
        self._library, self._wanted, self._tokenizer, self._budget = library, device, tokenizer, budget
        self._tasks: queue.SimpleQueue[Task | str | None] = queue.SimpleQueue()
        """Jobs, and names of models that are to be loaded."""
        self._admission = Admission()
        self._ready = threading.Event()
        self._unusable: DeviceUnusable | None = None
        self._lost = False
        self._device: Device | None = None
        self._weights: Weights | None = None
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)

    def start(self) -> None:
        """Begin loading torch; returns at once."""
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Block until the device is ready, or for so long; True once it is. Raises DeviceUnusable."""
        ready = self._ready.wait(seconds)
        if self._unusable:
            raise self._unusable
        return ready

    def run(self, request: Request, *, stop: StopAsked) -> Iterator[Event]:
        """Events of one job, as :meth:`diffusion_api.engine.base.Engine.run` describes them."""
        self._hash(request)
        canvas = self._canvas(request)
        with self._admission.admitted(stop):
            if self._lost:
                raise DeviceLost(LOST)
            yield Progress(state=State.LOADING, phase="loading")
            task = Task(request, canvas, stop)
            self._tasks.put(task)
            while not isinstance(event := task.next_event(), Finished):
                yield event
        # The device is free for the next job while this one is saved; so it need not wait for a hash either.
        model = self._library.find(request.model) if isinstance(request, Sampling) else None
        yield replace(event, model_hash=model.hash if model else None)

    def _hash(self, request: Request) -> None:
        """Have the hashes of the job's files made meanwhile, so that the device thread does not wait for them."""
        if not isinstance(request, Sampling):
            return
        prompts = [request.prompt]
        if isinstance(request, Txt2Img) and request.hires:
            prompts.append(request.hires.prompt)
        loras = {use.name for use in request.loras}
        loras |= {network.name for prompt in prompts for network in parse(prompt).networks}
        rows = [self._library.find(request.model), *(self._library.find_asset("lora", name) for name in loras)]
        if request.vae:
            rows.append(self._library.find_asset("vae", request.vae))
        for row in rows:
            if row:
                row.hash_soon()

    def _canvas(self, request: Request) -> Canvas | None:
        """What the job brings along, made ready while others have the device. Raises InputLost, InvalidImage."""
        if isinstance(request, Txt2Img):
            return None
        from diffusion_api import canvas

        return canvas.prepared(request, self._picture)

    def warm_up(self, model: str) -> None:
        """Load a model before a job asks for it."""
        self._tasks.put(model)

    @property
    def held(self) -> tuple[HeldModel, ...]:
        """The models in memory, the last used at the end."""
        found = self._weights.report if self._weights else ()
        return tuple(replace(held, idle=self._budget.idle) for held in found)

    def report(self) -> DeviceReport | None:
        """What the engine runs on; None while torch loads."""
        if self._device is None or self._weights is None:
            return None
        return replace(self._device.report(), models=self.held, versions=_versions())

    def close(self, seconds: float | None = None) -> bool:
        """End the device thread after the job in hand; False if it is in torch for longer than that."""
        self._tasks.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _main(self) -> None:
        keep_offline()
        try:
            import torch
            from diffusers.utils import logging as diffusers_logging
            from transformers.utils import logging as transformers_logging

            from diffusion_api.engine.extras import Extras
            from diffusion_api.engine.weights import Weights

            diffusers_logging.set_verbosity_error()
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            self._device = device = self._chosen()
            self._weights = weights = Weights(self._library, device, self._tokenizer)
            extras = Extras(self._library, weights.patch)
        except DeviceUnusable as error:
            self._unusable = error
            return
        except Exception as error:  # without an answer here, jobs would wait for this thread for ever
            log.critical("the engine cannot start", exc_info=True)
            self._unusable = DeviceUnusable(f"the engine cannot start: {type(error).__name__}; the log has the details")
            return
        finally:
            self._ready.set()
        log.info("engine ready on %s", device.report().name)
        with torch.inference_mode():
            for name in self._budget.warm_up:
                self._load(name, weights)
            while task := self._next(weights):
                if isinstance(task, str):
                    self._load(task, weights)
                else:
                    task.context.run(self._answer, task, weights, extras, device)

    def _chosen(self) -> Device:
        from diffusion_api.engine import devices

        return devices.choose(self._wanted, max_vram=self._budget.max_vram, max_ram=self._budget.max_ram)

    def _load(self, name: str, weights: Weights) -> None:
        """Have a model in memory before a job asks for it."""
        weights.begin()
        try:
            weights.load(name)
        except Exception as error:  # whatever it was, a job that asks for the model meets it again, and says it
            log.warning("model %s was not loaded: %s", name, error)
            _forget_tensors(error)
            if self._device:
                self._device.free()

    def _next(self, weights: Weights) -> Task | str | None:
        """The next job; None at the end. While there is none, models leave the memory when their time is over."""
        while True:
            try:
                return self._tasks.get(timeout=self._budget.idle if weights.occupied else None)
            except queue.Empty:
                log.info("no job for %g s: models leave the memory", self._budget.idle)
                weights.unload()

    def _answer(self, task: Task, weights: Weights, extras: Extras, device: Device) -> None:
        from diffusion_api.engine.job import Loaders, job
        from diffusion_api.engine.ladder import Ladder

        outcome: Finished | Exception
        ladder = Ladder(task.request, weights, device)
        asks = job(
            task.request,
            task.canvas,
            loaders=Loaders(
                model=ladder.load,
                upscaler=weights.upscaler,
                attach=extras.attach,
                checker=partial(self._checker, task.request, weights),
            ),
            policy=policy_for(task.request, self._policy),
            memory=lambda: device.memory_mb,
            report=task.events.put,
            stop=task.stop,
        )
        try:
            finished = self._drive(asks, task, ladder)
            outcome = replace(finished, model_cached=weights.hit, memory_steps=tuple(ladder.steps))
        except Exception as error:  # the job fails, whatever it was; the device thread lives on for the next one
            outcome = self._explained(error, task.request, device)
            if isinstance(outcome, OutOfMemory) and ladder.steps:
                outcome = OutOfMemory(f"{outcome} (tried {', '.join(ladder.steps)})")
            _forget_tensors(error)
        finally:
            asks.close()
        if isinstance(outcome, OutOfMemory):
            device.free()
        task.events.put(outcome)

    def _checker(self, request: Request, weights: Weights) -> Checker | None:
        """The safety checker for a job's pictures, None where none is installed. Raises ModelUnreadable, OutOfMemory."""
        files = self._library.checker(model_of(request))
        return weights.checker(files) if files else None

    def _explained(self, error: Exception, request: Request, device: Device) -> Exception:
        """The error in the words of the tree, where it is one of the device's."""
        from diffusion_api.engine.devices import is_out_of_memory

        if isinstance(error, DiffusionApiError):
            return error
        if is_out_of_memory(error):
            log.warning("out of memory", exc_info=error)
            return out_of_memory(request)
        if device.lost(error):
            log.critical("the device is lost", exc_info=error)
            self._lost = True
            return DeviceLost(LOST)
        return error

    def _drive(self, asks: Asks, task: Task, ladder: Ladder) -> Finished:
        """Answer one job's questions until it is finished."""
        answer = None
        while True:
            try:
                question = asks.send(answer)
            except StopIteration as end:
                finished: Finished = end.value
                return finished
            if task.stop() is Stop.NOW:
                raise Interrupted("stopped while it ran")
            answer = _answered(question, ladder)


@functools.cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")}


def _answered(question: Evaluate | Run, ladder: Ladder) -> Any:
    """The answer to one question, asked again with less use of memory until there is enough of it."""
    from diffusion_api.engine.devices import is_out_of_memory

    while True:
        try:
            return _computed(question, ladder.measures)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _forget_tensors(error)
            if not ladder.climb(question):
                raise


def _computed(question: Evaluate | Run, measures: Measures) -> Any:
    import torch

    from diffusion_api.engine.denoise import Run
    from diffusion_api.engine.thrift import SlicedAttention

    with SlicedAttention() if measures.slicing else nullcontext():
        if isinstance(question, Run):
            return question.work()
        lane, time, conditionings = question.lane, question.timestep, question.conditionings
        most = 1 if measures.singly else len(conditionings)
        batches = [conditionings[first : first + most] for first in range(0, len(conditionings), most)]
        rows = [
            lane.predict(question.latents.expand(len(batch), -1, -1, -1), time, batch, question.extra)
            for batch in batches
        ]
        return torch.cat(rows)


def _forget_tensors(error: BaseException) -> None:
    """Let go of what the frames in a traceback hold: whoever keeps the error would keep the memory of its job."""
    traceback.clear_frames(error.__traceback__)
    if error.__context__ is not None:
        _forget_tensors(error.__context__)
