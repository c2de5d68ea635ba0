"""The device thread: it owns the device, answers what running jobs ask for, and sends their events."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_api.catalog.library import Library
from diffusion_api.engine.base import Admission, Event, Finished, Stop, StopAsked, out_of_memory
from diffusion_api.errors import DeviceLost, DeviceUnusable, DiffusionApiError, Interrupted, OutOfMemory
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.report import DeviceReport
from diffusion_api.schema.request import Request
from diffusion_api.settings import keep_offline

if TYPE_CHECKING:
    from diffusion_api.engine.denoise import Asks
    from diffusion_api.engine.devices import Device
    from diffusion_api.engine.extras import Extras
    from diffusion_api.engine.weights import Weights

log = logging.getLogger(__name__)

CLOSING = 30.0
"""Seconds that the device thread may take to end."""

LOST = "the device failed and works no more until the service starts again; the log has the details"


@dataclass
class Task:
    """One job on the device, the way its events leave, and what the log knows of it where it was made."""

    request: Request
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

    def __init__(self, library: Library, *, device: str, tokenizer: Path) -> None:
        self._library, self._wanted, self._tokenizer = library, device, tokenizer
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._admission = Admission()
        self._ready = threading.Event()
        self._unusable: DeviceUnusable | None = None
        self._lost = False
        self._device: Device | None = None
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)

    def start(self) -> None:
        """Begin loading torch; returns at once."""
        self._thread.start()

    def wait(self) -> None:
        """Block until the device is ready. Raises DeviceUnusable."""
        self._ready.wait()
        if self._unusable:
            raise self._unusable

    def run(self, request: Request, *, stop: StopAsked) -> Iterator[Event]:
        """Events of one job, as :meth:`diffusion_api.engine.base.Engine.run` describes them."""
        with self._admission.admitted(stop):
            if self._lost:
                raise DeviceLost(LOST)
            yield Progress(state=State.LOADING, phase="loading")
            task = Task(request, stop)
            self._tasks.put(task)
            while not isinstance(event := task.next_event(), Finished):
                yield event
        yield event  # the device is free for the next job while this one is saved

    def report(self) -> DeviceReport | None:
        """What the engine runs on; None while torch loads."""
        return self._device.report() if self._device else None

    def close(self) -> None:
        """End the device thread after the job in hand; a thread that is still in torch when Python ends aborts the process."""
        self._tasks.put(None)
        self._thread.join(CLOSING)

    def _main(self) -> None:
        keep_offline()
        try:
            import torch
            from diffusers.utils import logging as diffusers_logging
            from transformers.utils import logging as transformers_logging

            from diffusion_api.engine import devices
            from diffusion_api.engine.extras import Extras
            from diffusion_api.engine.weights import Weights

            diffusers_logging.set_verbosity_error()
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            self._device = devices.choose(self._wanted)
            weights = Weights(self._library, self._device, self._tokenizer)
            extras = Extras(self._library)
        except DeviceUnusable as error:
            self._unusable = error
            return
        except Exception as error:  # without an answer here, jobs would wait for this thread for ever
            log.critical("the engine cannot start", exc_info=True)
            self._unusable = DeviceUnusable(f"the engine cannot start: {type(error).__name__}; the log has the details")
            return
        finally:
            self._ready.set()
        log.info("engine ready on %s", self._device.report().name)
        with torch.inference_mode():
            while task := self._tasks.get():
                task.context.run(self._answer, task, weights, extras, self._device)

    def _answer(self, task: Task, weights: Weights, extras: Extras, device: Device) -> None:
        from diffusion_api.engine import denoise

        outcome: Finished | Exception
        asks = denoise.job(
            task.request,
            load=weights.load,
            attach=extras.attach,
            memory=lambda: device.memory_mb,
            report=task.events.put,
            stop=task.stop,
        )
        try:
            outcome = replace(self._drive(asks, task), model_cached=weights.hit)
        except Exception as error:  # the job fails, whatever it was; the device thread lives on for the next one
            outcome = self._explained(error, task.request, device)
            _forget_tensors(error)
        finally:
            asks.close()
        if isinstance(outcome, OutOfMemory):
            device.free()
        task.events.put(outcome)

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

    def _drive(self, asks: Asks, task: Task) -> Finished:
        """Answer one job's questions until it is finished."""
        import torch

        from diffusion_api.engine.denoise import Evaluate

        answer = None
        while True:
            try:
                question = asks.send(answer)
            except StopIteration as end:
                finished: Finished = end.value
                return finished
            if task.stop() is Stop.NOW:
                raise Interrupted("stopped while it ran")
            if isinstance(question, Evaluate):
                rows = len(question.conditionings)
                latents = question.latents.expand(rows, -1, -1, -1)
                answer = question.lane.predict(latents, question.timestep, torch.cat(question.conditionings))
            else:
                answer = question.work()


def _forget_tensors(error: BaseException) -> None:
    """Let go of what the frames in a traceback hold: whoever keeps the error would keep the memory of its job."""
    traceback.clear_frames(error.__traceback__)
    if error.__context__ is not None:
        _forget_tensors(error.__context__)
