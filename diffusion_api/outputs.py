"""Names, saves and reads back the pictures in ``outputs/``."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from diffusion_api import __version__
from diffusion_api.catalog import samplers
from diffusion_api.disk import PAGE, check_writable, free, fsync_dir, probe, remove_abandoned, write_whole
from diffusion_api.engine.base import Embeddings, Finished
from diffusion_api.errors import DiskFull, OutputsUnusable
from diffusion_api.retention import Limits, due, entries
from diffusion_api.schema.job import File, Image, Job
from diffusion_api.schema.request import Format, Reading, Upscale

MIB = 2**20
FULL = (errno.ENOSPC, errno.EDQUOT)
SUFFIX: dict[Format, str] = {"png": "png", "jpeg": "jpg", "webp": "webp", "avif": "avif", "gif": "gif"}
OURS = re.compile(
    rf"(?P<job>[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})(-\d+)?\.({'|'.join(SUFFIX.values())}|json)"
)
"""Names that the service gives; what else lies in the folder is somebody's own."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _as_our_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull("the disk is full: the picture could not be saved") from error
        raise OutputsUnusable(f"the folder of outputs cannot be used: {error.strerror}") from error


class Outputs:
    """The folder of finished pictures. Files are named by job, so that a job run again writes over its own.

    Who removes the folder gets a new one. ``reserve`` are the bytes of its disk that jobs which have not begun leave to
    those that run. Raises DiskFull, OutputsUnusable.
    """

    @_as_our_errors()
    def __init__(self, folder: Path, *, reserve: int = 0) -> None:
        self.folder, self._reserve = folder, reserve
        self._tmp = folder / ".tmp"
        self._tmp.mkdir(parents=True, exist_ok=True)
        fsync_dir(folder.parent)
        remove_abandoned(self._tmp)

    def save(self, job: Job, finished: Finished) -> tuple[Image, ...]:
        """Encode and store the pictures of a job, durably. Raises DiskFull, OutputsUnusable."""
        return tuple(self._save_one(job, finished, number) for number in range(len(finished.images)))

    def save_embeddings(self, job: Job, numbers: Embeddings) -> File:
        """Store the numbers of a picture, durably: JSON as the UniDiffuser API has it. Raises DiskFull, OutputsUnusable."""
        content = {"CLIP_embeddings": numbers.clip.tolist(), "vae_emb": numbers.vae.tolist()}
        return File(**self._stored(f"{job.id}.json", json.dumps(content, separators=(",", ":")).encode()))

    @_as_our_errors()
    def check(self) -> None:
        """Try whether a picture could be written now. Raises DiskFull, OutputsUnusable."""
        self._make_again()
        left = free(self.folder)
        if left < self._reserve:
            raise DiskFull(
                f"{left // MIB} MiB are left on the disk of the pictures; {self._reserve // MIB} are kept for the running job"
            )
        probe(self._tmp, PAGE)
        check_writable(self.folder)

    def read(self, stored: Image | File) -> bytes | None:
        """The stored file, or None when it was deleted."""
        try:
            return (self.folder / Path(stored.path).name).read_bytes()
        except FileNotFoundError:
            return None

    def sweep(self, pictures: Limits, *, now: float, in_use: Callable[[], set[str]]) -> None:
        """Delete pictures beyond the limits, oldest first, but none of the jobs that ``in_use`` names. Raises OSError.

        It is asked after the folder was listed: a job that has ended by then writes no more over what was found.
        """
        ours = {entry: found["job"] for entry in entries(self.folder) if (found := OURS.fullmatch(entry.name))}
        beyond = due(ours, pictures, now=now, what="pictures")
        spared = in_use() if beyond else set()
        beyond = [entry for entry in beyond if ours[entry] not in spared]
        for entry in beyond:
            (self.folder / entry.name).unlink(missing_ok=True)
        if beyond:
            log.info("deleted %d pictures that are no longer kept (%d bytes)", len(beyond), sum(e.size for e in beyond))

    def _make_again(self) -> None:
        """Make a folder that was removed. One without ``.tmp`` may be where a disk was mounted, and is left alone."""
        if not self.folder.exists():
            for folder in (self.folder, self._tmp):
                folder.mkdir(exist_ok=True)  # another process may be at it as well
            fsync_dir(self.folder.parent)

    def _save_one(self, job: Job, finished: Finished, number: int) -> Image:
        from diffusion_api import images, infotext  # NumPy and Pillow: a third of the time until the service answers

        request, pixels, seed = job.request, finished.images[number], finished.seeds[number]
        if isinstance(request, Reading):
            raise TypeError(f"{request.kind} makes no picture")
        version = f"DiffusionAPI v{__version__}"
        if isinstance(request, Upscale):
            text = infotext.for_upscale(request, version=version)
        else:
            text = infotext.for_request(
                request,
                number=number,
                sampler_label=samplers.sampler(request.sampler).label,
                schedule_label=samplers.schedule(request.schedule).label,
                model_name=request.model,
                model_hash=finished.model_hash,
                known=finished.infotext,
                version=version,
            )
        output = request.output
        data = images.encode(
            pixels, format=output.format, quality=output.quality, infotext=text, lossless=output.lossless
        )
        stem = job.id if len(finished.images) == 1 else f"{job.id}-{number}"
        return Image(
            **self._stored(f"{stem}.{SUFFIX[output.format]}", data),
            width=pixels.shape[1],
            height=pixels.shape[0],
            seed=seed,
            pixels=hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest(),
            infotext=text,
        )

    @_as_our_errors()
    def _stored(self, name: str, data: bytes) -> dict[str, str]:
        """Write a file of ours: what the record says of it."""
        self._make_again()
        write_whole(self.folder / name, data, tmp=self._tmp)
        return {"path": f"{self.folder.name}/{name}", "sha256": hashlib.sha256(data).hexdigest()}
