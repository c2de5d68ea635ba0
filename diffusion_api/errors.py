"""Every error of the service, as one tree named for who must act.

    DiffusionApiError
    ├── CallerError             the caller can mend the request
    │   ├── InvalidRequest          a field has a wrong value
    │   │   ├── UnknownModel
    │   │   ├── UnknownSampler
    │   │   ├── InvalidImage
    │   │   └── UrlRefused          a URL that leads where the operator lets nobody go
    │   ├── NotFound                no such job, no such picture
    │   ├── Gone                    there was one, and its time is over
    │   ├── InputLost               a picture that a job brought along is no longer there as it was
    │   ├── Conflict                the job is in no state for that
    │   ├── TooLarge                body, picture or job beyond the operator's limits
    │   ├── KeyReused               an Idempotency-Key stands for another request
    │   ├── Unauthenticated         no credential, or one that is no longer valid
    │   ├── Forbidden               a credential, but not one for this
    │   ├── RateLimited             this caller has had its share for now
    │   ├── OutOfMemory             the job needs more memory than there is
    │   ├── NotFinite               the model's numbers overflowed: there is no picture
    │   └── UnsafePicture           the safety checker flagged a picture, and the operator refuses those
    ├── OperatorError           the person who runs the box must act
    │   ├── Misconfigured           a setting or a folder is wrong; the service does not start
    │   ├── DeviceUnusable          a GPU is there but cannot be used
    │   ├── ModelUnreadable         a file under the model folders is broken or of no known kind
    │   ├── NoChecker               pictures must be checked, and there is no safety checker
    │   ├── NotInstalled            what a route needs is not there
    │   ├── Gated                   the owner of a model wants terms accepted, or a token
    │   ├── NoAdminKey              only an admin may do this, and there is none
    │   ├── KeysUnreadable          the file of the keys is broken: nobody can be let in
    │   ├── QueueUnusable           the queue's folder cannot be written
    │   ├── OutputsUnusable         the folder of pictures cannot be written
    │   └── DeviceLost              the device works no more until the process starts again
    └── Unavailable             nobody's fault; try again later
        ├── DiskFull
        ├── QueueFull
        ├── NoModel             there is no model that could draw what names none
        ├── ShuttingDown
        │   └── Unfinished          a job that somebody waits for goes on after the stop
        ├── Unreachable         another host did not answer
        ├── BrokenDownload      another host sent something else than what was asked for
        └── Interrupted             the job was told to stop: cancelled, or the service is going down

The message carries the value and the choices, and no path of the host.
"""

from __future__ import annotations


class DiffusionApiError(Exception):
    """Root of the tree; its text may be shown to callers."""


class CallerError(DiffusionApiError):
    """The caller can mend the request."""


class InvalidRequest(CallerError):
    """A field has a wrong value.

    ``field`` is the name as the caller wrote it, for dialects whose error bodies name it.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnknownModel(InvalidRequest):
    """No installed model has that name."""


class UnknownSampler(InvalidRequest):
    """No sampler or schedule has that name."""


class InvalidImage(InvalidRequest):
    """Bytes that are no picture, or one of a kind that is not accepted."""


class UrlRefused(InvalidRequest):
    """A URL that leads where the operator lets nobody go."""


class NotFound(CallerError):
    """No such thing."""


class Gone(CallerError):
    """There was such a thing, and it was kept for as long as the operator wants."""


class InputLost(CallerError):
    """A picture that a job brought along is gone or damaged: it must be sent again."""


class Conflict(CallerError):
    """The job is in no state for that."""


class KeyReused(CallerError):
    """An Idempotency-Key was sent again, with another request than the first time."""


class Unauthenticated(CallerError):
    """No credential, or one that is no longer valid. ``scheme`` is how one may be sent (RFC 9110, 11.6.1)."""

    def __init__(self, message: str, *, scheme: str) -> None:
        super().__init__(message)
        self.scheme = scheme


class Forbidden(CallerError):
    """A credential that does not open this."""


class RateLimited(CallerError):
    """This caller has had its share; ``retry_after`` seconds later there is more."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLarge(CallerError):
    """Beyond the operator's limits."""


class OutOfMemory(CallerError):
    """The job needs more memory than the device or the machine has."""


class NotFinite(CallerError):
    """The model's numbers overflowed into NaN or infinity: there is no picture in them."""


class UnsafePicture(CallerError):
    """The safety checker flagged a picture, and the operator refuses such."""


class OperatorError(DiffusionApiError):
    """The person who runs the box must act."""


class Misconfigured(OperatorError):
    """A setting or a folder is wrong."""


class DeviceUnusable(OperatorError):
    """A GPU is there but cannot be used."""


class ModelUnreadable(OperatorError):
    """A file under the model folders is broken or of no known kind."""


class NoChecker(OperatorError):
    """The operator requires that pictures are checked, and there is no safety checker."""


class NotInstalled(OperatorError):
    """What a route cannot do without is not there: the message says how to get it."""


class Gated(OperatorError):
    """The owner of a model lets only those have it who accepted terms, or were invited."""


class NoAdminKey(OperatorError):
    """Only an admin may do this, and the service has no key of one."""


class KeysUnreadable(OperatorError):
    """The file of the keys is broken, or a newer release's."""


class QueueUnusable(OperatorError):
    """The queue's folder cannot be read or written."""


class OutputsUnusable(OperatorError):
    """The folder of pictures cannot be written."""


class DeviceLost(OperatorError):
    """The device answers every call with an error until the process starts again."""


class Unavailable(DiffusionApiError):
    """Not now; the same request may work later."""


class DiskFull(Unavailable):
    """No room for the job or its result."""


class QueueFull(Unavailable):
    """As many jobs wait as the operator allows."""


class NoModel(Unavailable):
    """No model is installed, or none that goes without saying."""


class ShuttingDown(Unavailable):
    """The service is stopping."""


class Unfinished(ShuttingDown):
    """The service stops while somebody waits for the end of a job, which is kept and goes on later."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"the service stops; the job is kept and goes on when it is back: GET /queue/{job_id}; "
            "sent again, the request makes another one, but with the same Idempotency-Key"
        )
        self.job_id = job_id


class Unreachable(Unavailable):
    """Another host did not answer, or may not be called at the address that it has now."""


class BrokenDownload(Unavailable):
    """What another host sent is not what was asked for."""


class Interrupted(Unavailable):
    """A running job was told to stop, because its caller cancelled it or the service is going down."""
