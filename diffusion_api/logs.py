"""What is logged, and how: the request and the job of each line, and nothing private in it.

Every line that leaves the process passes :func:`cleaned`, exceptions and the lines of libraries included.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import logging.handlers
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_api.errors import Misconfigured

if TYPE_CHECKING:
    from diffusion_api.settings import Settings

log = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that this context answers."""

_job_id: ContextVar[str] = ContextVar("job_id", default="")
_prompts: ContextVar[tuple[str, ...]] = ContextVar("prompts", default=())

_SHORT = 8
"""Prompts of fewer characters are no secret, and taking every "a cat" out of a trace would leave a riddle."""

CHATTY = ("httpx", "httpcore", "PIL", "asyncio")

# Base64 in one run, or wrapped into lines as encoders do; the lines may stand in a repr, with their ends escaped.
_B = r"[A-Za-z0-9+/_-]"
_END = r"(?:\r?\n|\\r\\n|\\n)[ \t]*"
_PICTURE = re.compile(
    r"data:image/[^,\s'\"]{0,200},[A-Za-z0-9+/=_%-]*"
    rf"|(?<!{_B})(?:{_B}{{60,}}+(?:{_END}{_B}{{60,}}+)++(?:{_END}{_B}++)?|{_B}{{101,}}+)={{0,2}}"
)

_NAMES = r"authorization|api[_-]?key|access[_-]?key|token|secret|passw(?:or)?d|passphrase|signature|cookie"
_CREDENTIALS = (
    # `name: value`, `"name": "value"`, `name=value`, `(b'name', b'value')`, with the scheme of an Authorization header
    (
        re.compile(
            rf"(?i)((?:{_NAMES})['\"]?\s*(?:[:=]|,(?=\s*b?['\"]))\s*)"
            r"(?:b?'[^']*'|b?\"[^\"]*\"|(?:(?:bearer|basic|digest|token)\s+)?[^\s'\"&;,)\]}]+)"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), r"\1***"),
    (re.compile(r"\b(hf_|sk-|dapi_)[A-Za-z0-9_-]{8,}"), r"\1***"),
    (re.compile(r"://[^/\s@'\"]+@"), "://***@"),
    (re.compile(r"(/(?:image|blob)/[\w-]+(?:\.\d+)+\.)[0-9a-f]+"), r"\1***"),  # who has the link sees the picture
)

# Line ends, terminal commands, and characters that change the direction of what follows.
_CONTROL = (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROL}


def configure(settings: Settings, *, role: str = "") -> None:
    """Send this process's log where the settings say. Raises Misconfigured.

    Lines go to stderr, so that stdout has only what a command says; also where Python was when native code crashes.
    ``role`` tells one process of several: it stands in each line, and in the name of the log's file, as two processes
    that rotate one file would lose lines.
    """
    faulthandler.enable(2)  # the descriptor: sys.stderr may be anything
    process = f"{role} {os.getpid()}" if role else ""
    formatter = (Json if settings.log_format == "json" else Plain)(process, prompts=settings.log_prompts)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if settings.log_file:
        handlers.append(_file_handler(settings, role))
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=settings.log_level.upper(), handlers=handlers, force=True)
    logging.raiseExceptions = False  # a line that cannot be written is lost; it must not be shown unmasked either
    logging.captureWarnings(True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    sys.excepthook = lambda kind, error, trace: log.critical("the process ends", exc_info=error)
    threading.excepthook = lambda ended: log.critical(
        "thread %s ended", ended.thread.name if ended.thread else "", exc_info=ended.exc_value
    )


@contextmanager
def about(job_id: str, *prompts: str) -> Iterator[None]:
    """Within, each line names this job, and no line holds its prompts unless the settings allow it."""
    job, texts = _job_id.set(job_id), _prompts.set(prompts)
    try:
        yield
    finally:
        _job_id.reset(job)
        _prompts.reset(texts)


def cleaned(text: str) -> str:
    """The text with ``[BASE64_IMAGE_DATA_<n>_chars]`` in place of pictures, and without credentials."""
    text = _PICTURE.sub(lambda found: f"[BASE64_IMAGE_DATA_{len(found[0])}_chars]", text)
    for pattern, instead in _CREDENTIALS:
        text = pattern.sub(instead, text)
    return text


def escaped(text: str) -> str:
    """The text in one line that no terminal obeys: control characters as ``\\n``, ``\\x1b``, …"""
    return text.translate(_ESCAPES)


class _Formatter(logging.Formatter):
    """What the two forms of a line share."""

    def __init__(self, process: str, *, prompts: bool) -> None:
        super().__init__()
        self._process, self._shows_prompts = process, prompts

    def _message(self, record: logging.LogRecord) -> str:
        return self._clean(record.getMessage())

    def _trace(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        return self._clean(trace)

    def _clean(self, text: str) -> str:
        for prompt in () if self._shows_prompts else _prompts.get():
            if len(prompt) >= _SHORT:
                for form in (prompt, repr(prompt)[1:-1]):
                    text = text.replace(form, f"[PROMPT_{len(prompt)}_chars]")
        return cleaned(text)


class Plain(_Formatter):
    """Time, level, request, job, message. Lines that follow, of a trace, are indented, so that no text can forge one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and an indented one for each line of a trace."""
        message, request, job = self._message(record), request_id.get(), _job_id.get()
        parts = [f"{self.formatTime(record)} [{record.levelname}]"]
        if self._process:
            parts.append(f"[{self._process}]")
        if request:
            parts.append(f"[request {request}]")
        if job and job not in message:
            parts.append(f"job {job}:")
        first = " ".join([*parts, escaped(message)])
        return "\n    ".join([first, *map(escaped, self._trace(record).splitlines())])


class Json(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; what is empty is left out."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "request_id": request_id.get(),
            "job_id": _job_id.get(),
            "message": self._message(record),
            "exception": self._trace(record),
        }
        return json.dumps({name: text for name, text in fields.items() if text})


def _file_handler(settings: Settings, role: str) -> logging.Handler:
    assert settings.log_file is not None
    path: Path = settings.home / settings.log_file
    if role:
        path = path.with_name(f"{path.stem}.{role}{path.suffix}")
    try:
        return logging.handlers.RotatingFileHandler(
            path,
            maxBytes=settings.log_file_mb * 2**20,
            backupCount=settings.log_file_count,
            encoding="utf-8",
            errors="backslashreplace",
        )
    except OSError as error:
        raise Misconfigured(f"log_file {path} cannot be written: {error.strerror}") from error
