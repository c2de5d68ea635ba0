"""What happens to one owned job: execute, save, commit."""

from __future__ import annotations

import base64
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable

from diffusion_api import logs
from diffusion_api.engine.base import PATIENCE, Engine, Finished, Preview, Stop, StopAsked
from diffusion_api.errors import (
    DeviceLost,
    DiffusionApiError,
    DiskFull,
    Interrupted,
    OperatorError,
    QueueUnusable,
    TooLarge,
)
from diffusion_api.metrics import JobMetrics
from diffusion_api.outputs import Outputs
from diffusion_api.pace import Pace
from diffusion_api.presence import Presence
from diffusion_api.queues.base import Control, Queue
from diffusion_api.schema.job import Job, Progress, Result, State
from diffusion_api.storage import Storage

log = logging.getLogger(__name__)

SLOTS = 2
"""Jobs in hand: one on the device, and one that is being saved or waits to be next."""

HUNG = 10.0
"""Seconds beyond its deadline without a word from the device, after which a job's step counts as one that never ends."""

BREATH = 5.0
"""Seconds beyond the grace that a step has to come to its end."""

WATCH_EVERY = 1.0
RELEASING = 2.0
"""Seconds that the other jobs in hand have to go back to the queue before the process starts again."""

PREVIEW_QUALITY = 80

RETRY = 2.0
"""Seconds between two tries to write the end of a job."""

EXIT_WORKER_DIED = 70
"""Exit code of a process whose worker thread broke: its lock must drop, so that its jobs are recovered."""


class _Hand:
    """A job in hand. Times are monotonic."""

    def __init__(self, job: Job, control: Control) -> None:
        self.job, self.control = job, control
        self.on_device = False
        self.heard = 0.0
        """When the device last told something of it."""
        self.due = math.inf
        """When it must have left the device."""

    @property
    def overdue(self) -> bool:
        """True once it has run for longer than its deadline allows."""
        return time.monotonic() > self.due

    @property
    def hung(self) -> bool:
        """True when it is overdue and does not even come to the end of its step."""
        return time.monotonic() - max(self.due, self.heard) > HUNG

    def enters(self, job: Job) -> None:
        """The job, charged, has the device from now on."""
        self.job, self.heard = job, time.monotonic()
        self.due = self.heard + (job.deadline or math.inf)
        self.on_device = True

    def leaves(self) -> None:
        """The device is free for the next."""
        self.on_device, self.due = False, math.inf

    def past_deadline(self) -> Job:
        """The job, ended by its deadline."""
        return self.job.failed("DeadlinePassed", f"the deadline of {self.job.deadline:g} s passed")


class Worker:
    """Serves a queue with an engine, on a thread of its own.

    ``died`` ends this process when the worker broke, ``restart`` starts it again, with a reason, when only that can mend
    the device. Both happen with jobs still in hand only if those are for the queue's recovery.
    """

    def __init__(
        self,
        queue: Queue,
        engine: Engine,
        outputs: Outputs,
        *,
        pace: Pace | None = None,
        died: Callable[[], None] | None = None,
        restart: Callable[[str], None] | None = None,
        restarts: int = 0,
    ) -> None:
        self._queue, self._engine, self._outputs, self._pace = queue, engine, outputs, pace
        self._storage = Storage(queue.check_disk, outputs.check)
        self._barred = False
        self._metrics = JobMetrics()
        self._presence = Presence(queue, engine, self._metrics, restarts, self._due)
        self._died = died or (lambda: os._exit(EXIT_WORKER_DIED))
        self._restart = restart or (lambda reason: self._died())
        self._hands: dict[str, _Hand] = {}
        self._stopping = False
        self._device_lost = threading.Lock()  # taken by the job that lost it, for good
        self._deadline: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name="worker", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin: the engine loads, then jobs are claimed."""
        self._engine.start()
        self._thread.start()
        self._watchdog.start()

    def stop(self, grace: float) -> None:
        """Claim nothing more. The running job may take ``grace`` seconds to finish, then it is queued again. Blocks."""
        if self._ended.is_set():
            return
        self._stopping = True
        until = time.monotonic() + grace
        self._end_by(until)
        self._thread.join(grace + BREATH)
        for hand in list(self._hands.values()):
            log.warning("job %s goes back to the queue in the middle of a step that does not end", hand.job.id)
            with contextlib.suppress(DiffusionApiError):
                hand.control.release()
        self._ended.set()
        self._engine.close(max(0.0, until - time.monotonic()))

    def _due(self) -> float | None:
        """When the job on the device must have left it."""
        due = min((hand.due for hand in list(self._hands.values())), default=math.inf)
        return due if due < math.inf else None

    def _end_by(self, deadline: float) -> None:
        self._deadline = deadline
        self._queue.stop()

    def _main(self) -> None:
        try:
            self._queue.recover()  # now, as the engine may take a while to load
            while not self._engine.wait(PATIENCE):
                if self._stopping:
                    return
            self._presence.tell()
            if self._deadline is None:
                self._queue.serve(self.handle, ready=self._ready, slots=SLOTS)
        except DeviceLost as error:
            self._start_again(str(error))
        except OperatorError as error:
            log.critical("the service cannot run jobs and ends: %s", error)
            self._end()
        except BaseException:
            log.critical("the worker stopped; this process ends so that its jobs are recovered", exc_info=True)
            self._end()

    def _ready(self) -> bool:
        """Whether the end and the pictures of one more job could be written: else it waits rather than fails."""
        if not self._barred:
            self._storage.look_again()  # a job that fails costs more than a look
        reasons = self._storage.reasons()
        if reasons and not self._barred:
            log.critical("no job begins now: %s", "; ".join(reasons))
        elif self._barred and not reasons:
            log.info("jobs begin again: they can be written")
        self._barred = bool(reasons)
        return not reasons

    def _end(self) -> None:
        """End the process, unless it comes to its end anyway."""
        if not self._stopping:
            self._died()

    def _start_again(self, reason: str) -> None:
        log.critical("the worker must start again: %s", reason)
        if not self._stopping:
            self._restart(reason)

    def _watch(self) -> None:
        """End a job whose step hangs beyond its deadline, and with it the process that can no longer be used. Without jobs,
        tell what is no longer in memory.
        """
        while not self._ended.wait(WATCH_EVERY):
            if not self._hands:
                self._presence.look()
            for hand in list(self._hands.values()):
                if hand.hung:
                    self._end_by(time.monotonic())
                    self._committed(hand.control, hand.past_deadline())
                    self._let_others_go()
                    self._start_again(f"job {hand.job.id} hangs in a step")
                    return

    def _let_others_go(self) -> None:
        """Wait until the jobs that have not begun are back in the queue, so that they need no recovery."""
        until = time.monotonic() + RELEASING
        while len(self._hands) > 1 and time.monotonic() < until:
            time.sleep(PATIENCE)

    def handle(self, job: Job, control: Control) -> None:
        """Run one claimed job to its end: exactly one commit or release.

        Raises DeviceLost with neither: the job that lost the device may do so each time, so it is left to the queue's
        recovery, which counts. Raises QueueUnusable when the service stops before the end could be written.
        """
        with self._presence.holding(job.id), logs.about(job.id, *job.request.prompts):
            hand = self._hands[job.id] = _Hand(job, control)
            try:
                self._handle(hand)
            finally:
                del self._hands[job.id]

    def _handle(self, hand: _Hand) -> None:
        ended = self._execute(hand)
        if ended is None:
            log.info("job %s goes back to the queue: the service is stopping", hand.job.id)
            try:
                hand.control.release()
            except (DiskFull, QueueUnusable) as error:
                raise _left_behind(hand.job) from error
            return
        while not self._committed(hand.control, ended):
            if self._deadline is not None:
                raise _left_behind(hand.job)
            time.sleep(RETRY)

    def _execute(self, hand: _Hand) -> Job | None:
        """The job as it ended, or None when it was stopped through no fault of its own."""
        control = hand.control

        def stop() -> Stop | None:
            stopping = self._deadline is not None and (not hand.on_device or time.monotonic() > self._deadline)
            if control.cancelled:
                return Stop.WITH_PICTURE if control.partial and not stopping else Stop.NOW
            return Stop.NOW if stopping or hand.overdue else None

        try:
            return self._run(hand, stop)
        except Interrupted:
            if control.cancelled:
                return hand.job.cancelled()
            return hand.past_deadline() if hand.overdue else None
        except DeviceLost:
            if not self._device_lost.acquire(blocking=False):
                return None  # another job lost it, and this one met what was left
            self._end_by(time.monotonic())
            raise
        except DiffusionApiError as error:
            if error.__cause__:
                log.warning("job %s failed", hand.job.id, exc_info=error)
            return hand.job.failed(type(error).__name__, str(error))
        except Exception as error:  # whatever a model or a library raised fails this job and nothing else
            log.exception("job %s failed", hand.job.id)
            reason = f"the engine failed: {type(error).__name__}; the log has the details under job {hand.job.id}"
            return hand.job.failed("InternalError", reason)
        finally:
            hand.leaves()

    def _run(self, hand: _Hand, stop: StopAsked) -> Job:
        """The job with its pictures saved. Raises what the engine raises."""
        if stop():
            raise Interrupted("stopped before it began")
        began: float | None = None
        first: tuple[float, float] | None = None
        latest = Progress()
        for event in self._metrics.watched(hand.job, self._engine.run(hand.job.request, stop=stop)):
            hand.heard = time.monotonic()
            self._presence.moved()
            if began is None:
                hand.enters(self._started(hand, stop))
                self._presence.tell()
                began = hand.heard
            if isinstance(event, Finished):
                hand.leaves()  # now, as it is free for the next job while this one is saved
                self._presence.look()  # before the caller hears of the end, and asks what is in memory
                if self._pace and first and event.partial is None:
                    self._pace.learn(hand.job.request, hand.heard - first[0], share=1 - first[1])
                result = self._result(hand.job, event, began)
                if event.partial is not None:
                    return hand.job.cancelled(result)
                return hand.job.succeeded(result, event.warnings)
            if isinstance(event, Preview):
                latest = latest.model_copy(update={"preview": _jpeg(event)})
            else:
                latest = event.model_copy(update={"preview": latest.preview})
            if first is None and latest.state is State.PROCESSING:
                first = hand.heard, latest.fraction
            hand.control.progress(latest)
        raise RuntimeError("the engine ended without a picture")

    def _started(self, hand: _Hand, stop: StopAsked) -> Job:
        """The job, charged. A full or failing disk is waited for, as nothing was done yet. Raises Interrupted."""
        while True:
            try:
                return hand.control.started()
            except (DiskFull, QueueUnusable) as error:
                log.error("job %s: its start cannot be written, trying again: %s", hand.job.id, error)
            if stop():
                raise Interrupted("stopped before it began")
            time.sleep(RETRY)

    def _committed(self, control: Control, job: Job) -> bool:
        """True once the record is written. A full or failing disk is waited for: the claim stays, so nothing is lost."""
        try:
            control.commit(job)
        except (DiskFull, QueueUnusable) as error:
            log.error("job %s: its end cannot be written, trying again: %s", job.id, error)
            return False
        except TooLarge as error:
            bare = job.model_copy(update={"result": None})
            return self._committed(control, bare.failed(type(error).__name__, str(error)))
        self._metrics.ended(job)
        if job.error:
            log.warning("job %s %s: %s", job.id, job.state, job.error.message)
        else:
            log.info("job %s done in %.2f s", job.id, job.result.seconds if job.result else 0)
        return True

    def _result(self, job: Job, finished: Finished, began: float) -> Result:
        with self._metrics.saving():
            saved = self._outputs.save(job, finished)
            numbers = self._outputs.save_embeddings(job, finished.embeddings) if finished.embeddings else None
        return Result(
            images=saved,
            caption=finished.caption,
            embeddings=numbers,
            seconds=time.monotonic() - began,
            memory_before_mb=finished.memory_before_mb,
            memory_after_mb=finished.memory_after_mb,
            loras_applied=finished.loras_applied,
            loras_skipped=finished.loras_skipped,
            memory_steps=finished.memory_steps,
            made_with=self._made_with(),
            safety=finished.safety,
        )

    def _made_with(self) -> dict[str, str]:
        report = self._engine.report()
        return {"device": report.name, **report.versions} if report else {}


def _jpeg(preview: Preview) -> str:
    from diffusion_api import images

    data = images.encode(preview.image, format="jpeg", quality=PREVIEW_QUALITY, infotext=None)
    return base64.b64encode(data).decode()


def _left_behind(job: Job) -> QueueUnusable:
    return QueueUnusable(f"what became of job {job.id} could not be written: it runs again after a new start")
