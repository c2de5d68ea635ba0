"""What happens to one owned job: execute, save, commit."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from diffusion_api.engine.base import Engine, Finished, Stop
from diffusion_api.errors import DiffusionApiError, DiskFull, Interrupted, OperatorError, QueueUnusable, TooLarge
from diffusion_api.outputs import Outputs
from diffusion_api.queues.base import Control, Queue
from diffusion_api.schema.job import Job, Result

log = logging.getLogger(__name__)

SLOTS = 2
"""Jobs in hand: one on the device, and one that is being saved or waits to be next."""

RETRY = 2.0
"""Seconds between two tries to write the end of a job."""

EXIT_WORKER_DIED = 70
"""Exit code of a process whose worker thread broke: its lock must drop, so that its jobs are recovered."""


class Worker:
    """Serves a queue with an engine, on a thread of its own."""

    def __init__(
        self, queue: Queue, engine: Engine, outputs: Outputs, *, died: Callable[[], None] | None = None
    ) -> None:
        self._queue, self._engine, self._outputs = queue, engine, outputs
        self._died = died or (lambda: os._exit(EXIT_WORKER_DIED))
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._main, name="worker", daemon=True)

    def start(self) -> None:
        """Begin: the engine loads, then jobs are claimed."""
        self._engine.start()
        self._thread.start()

    def stop(self, grace: float) -> None:
        """Claim nothing more. The running job may take ``grace`` seconds to finish, then it is queued again. Blocks."""
        self._deadline = time.monotonic() + grace
        self._queue.stop()
        self._thread.join(grace + 5)
        self._engine.close()

    def _main(self) -> None:
        try:
            self._engine.wait()
            if self._deadline is None:
                self._queue.serve(self.handle, slots=SLOTS)
        except OperatorError as error:
            log.critical("the service cannot run jobs and ends: %s", error)
            self._died()
        except BaseException:
            log.critical("the worker stopped; this process ends so that its jobs are recovered", exc_info=True)
            self._died()

    def handle(self, job: Job, control: Control) -> None:
        """Run one claimed job to its end: exactly one commit or release."""
        ended = self._execute(job, control)
        if ended is None:
            log.info("job %s goes back to the queue: the service is stopping", job.id)
            control.release()
            return
        while not self._committed(control, ended) and self._deadline is None:
            time.sleep(RETRY)

    def _execute(self, job: Job, control: Control) -> Job | None:
        """The job as it ended, or None when it was stopped through no fault of its own."""
        admitted = False

        def stop() -> Stop | None:
            stopping = self._deadline is not None and (not admitted or time.monotonic() > self._deadline)
            return Stop.NOW if stopping or control.cancelled else None

        began = time.monotonic()
        try:
            if stop():
                raise Interrupted("stopped before it began")
            for event in self._engine.run(job.request, stop=stop):
                if not admitted:
                    admitted, began = True, time.monotonic()
                    job = control.started()
                if isinstance(event, Finished):
                    return job.succeeded(self._result(job, event, began), event.warnings)
                control.progress(event)
            raise RuntimeError("the engine ended without a picture")
        except Interrupted:
            return job.cancelled() if control.cancelled else None
        except DiffusionApiError as error:
            return job.failed(type(error).__name__, str(error))
        except Exception as error:  # whatever a model or a library raised fails this job and nothing else
            log.exception("job %s failed", job.id)
            return job.failed("InternalError", f"the engine failed: {type(error).__name__}; the log has the details")

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
        if job.error:
            log.warning("job %s %s: %s", job.id, job.state, job.error.message)
        else:
            log.info("job %s done in %.2f s", job.id, job.result.seconds if job.result else 0)
        return True

    def _result(self, job: Job, finished: Finished, began: float) -> Result:
        saved = self._outputs.save(job, finished)
        return Result(
            images=saved,
            seconds=time.monotonic() - began,
            memory_before_mb=finished.memory_before_mb,
            memory_after_mb=finished.memory_after_mb,
        )
