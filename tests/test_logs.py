"""The log: nothing private in it, nothing that a caller could forge, and each line with its request and job."""

from __future__ import annotations

import base64
import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_models import diffusers_folder
from hypothesis import given
from hypothesis import strategies as st
from serving import Program, eventually, run, serving

from diffusion_api import logs
from diffusion_api.errors import Misconfigured
from diffusion_api.settings import Settings

PICTURE = base64.b64encode(bytes(range(256)) * 4).decode()


class Written:
    """What was written to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._text = capsys, ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """What goes to stderr, once ``logs.configure`` has run; afterwards logging is as it was."""
    root, hooks = logging.getLogger(), (sys.excepthook, threading.excepthook, logging.raiseExceptions)
    handlers, level = root.handlers[:], root.level
    yield Written(capsys)
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level
    sys.excepthook, threading.excepthook, logging.raiseExceptions = hooks
    logging.captureWarnings(False)


def one_line(written: Written, message: str, *values: object, **settings: object) -> str:
    """What one call of the log writes."""
    logs.configure(Settings(**settings))  # type: ignore[arg-type]
    logging.getLogger("test").info(message, *values)
    return written.getvalue()


# pictures


@pytest.mark.parametrize(
    "picture",
    [
        PICTURE,
        f"data:image/png;base64,{PICTURE}",
        "data:image/png;base64,iVBORw0KGgo=",
        base64.urlsafe_b64encode(bytes(range(256))).decode(),
        "A" * 101,
        "A" * 1_000_000,
    ],
    ids=["plain", "URL", "short URL", "URL-safe", "just long enough", "a megabyte"],
)
@pytest.mark.parametrize("frame", ["{}", "image={!r}, seed=1", "{{'image': {!r}}}", "('{}', 5)"])
def test_a_picture_is_told_by_its_length(frame: str, picture: str) -> None:
    assert logs.cleaned(frame.format(picture)) == frame.format(f"[BASE64_IMAGE_DATA_{len(picture)}_chars]")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\\n", "\n    "])
def test_a_picture_in_lines_is_one_picture(end: str) -> None:
    wrapped = base64.encodebytes(bytes(500)).decode().rstrip().replace("\n", end)
    assert logs.cleaned(f"<{wrapped}>") == f"<[BASE64_IMAGE_DATA_{len(wrapped)}_chars]>"


@pytest.mark.parametrize(
    "text",
    [
        "job 242d6f93-ea2d-4d5e-b820-0b61468558be done in 1.25 s",
        "sha256 " + "0123456789abcdef" * 4,
        'File "/srv/diffusion/.venv/lib/python3.11/site-packages/diffusers/models/unets/unet_2d_condition.py", line 5',
        "a prompt of many words and no base64 " * 20,
        "127.0.0.1 GET /queue/242d6f93-ea2d-4d5e-b820-0b61468558be 200 in 3 ms",
        "A" * 100,
    ],
)
def test_what_is_no_picture_stays(text: str) -> None:
    assert logs.cleaned(text) == text


def test_a_picture_in_an_exception_is_told_by_its_length(written: Written) -> None:
    logs.configure(Settings())
    try:
        raise ValueError(f"cannot read {PICTURE}")
    except ValueError:
        logging.getLogger("test").exception("failed with %s", PICTURE)
    assert written.getvalue().count(f"[BASE64_IMAGE_DATA_{len(PICTURE)}_chars]") == 2
    assert PICTURE[:40] not in written.getvalue()


def test_cleaning_takes_time_in_proportion_to_the_text() -> None:
    def seconds(text: str) -> float:
        began = time.process_time()
        logs.cleaned(text)
        return time.process_time() - began

    for piece in ("A" * 99 + " ", "é", "token", "://", "A" * 60 + "\n", "data:image/", "hf_", "bearer "):
        short, long = (min(seconds(piece * (n // len(piece))) for _ in range(3)) for n in (20_000, 400_000))
        assert long < 200 * (short + 0.001), piece


# credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer s3cr3t-value", "Authorization: ***"),
        ("authorization: Basic dXNlcjpwYXNz", "authorization: ***"),
        ("{'authorization': 'Bearer s3cr3t-value', 'x': 1}", "{'authorization': ***, 'x': 1}"),
        ("[(b'authorization', b'Bearer s3cr3t-value'), (b'host', b'h')]", "[(b'authorization', ***), (b'host', b'h')]"),
        ("X-API-Key: s3cr3t", "X-API-Key: ***"),
        ("api_key='s3cr3t & more' next", "api_key=*** next"),
        ("GET /x?api-key=s3cr3t&steps=1", "GET /x?api-key=***&steps=1"),
        ('{"password": "s3cr3t"}', '{"password": ***}'),
        ("DIFFUSION_API_WEBHOOK_SECRET=s3cr3t", "DIFFUSION_API_WEBHOOK_SECRET=***"),
        ("HF_TOKEN=s3cr3t", "HF_TOKEN=***"),
        ("sent Bearer abcdefgh12345678 along", "sent Bearer *** along"),
        ("a token hf_AbCdEfGhIjKlMnOp in prose", "a token hf_*** in prose"),
        ("key sk-AbCdEfGhIjKlMnOp", "key sk-***"),
        ("https://user:s3cr3t@example.org/x", "https://***@example.org/x"),
        ("redis://:s3cr3t@host:6379/0", "redis://***@host:6379/0"),
        ("Cookie: session=s3cr3t", "Cookie: ***"),
        (
            "GET /sd/image/242d6f93-ea2d.0.1795341600.5f0c1a 200 in 3 ms",
            "GET /sd/image/242d6f93-ea2d.0.1795341600.*** 200 in 3 ms",
        ),
        ("GET /blob/242d6f93-ea2d.0.1795341600.5f0c1a 200", "GET /blob/242d6f93-ea2d.0.1795341600.*** 200"),
        ("GET /blob/881ccd36e3b8.1795895371.89369987443 200", "GET /blob/881ccd36e3b8.1795895371.*** 200"),
    ],
)
def test_credentials_are_masked(text: str, shown: str) -> None:
    assert logs.cleaned(text) == shown


@pytest.mark.parametrize(
    "text", ["77 tokens at most", "the tokenizer: CLIP", "basic configuration", "me@example.org", "http://host/a@b"]
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert logs.cleaned(text) == text


# forged lines


@given(st.text())
def test_no_message_makes_a_second_line(text: str) -> None:
    shown = logs.escaped(text)
    assert len(shown.splitlines()) <= 1
    assert all(ord(c) >= 32 and not 127 <= ord(c) < 160 for c in shown)


def test_control_characters_are_escaped(written: Written) -> None:
    line = one_line(written, "%s", "one\n2026-01-01 00:00:00,000 [INFO] forged\r\x1b[31m\x00\x85\u2028\u202e!")
    assert line.endswith("one\\n2026-01-01 00:00:00,000 [INFO] forged\\r\\x1b[31m\\x00\\x85\\u2028\\u202e!\n")
    assert line.count("\n") == 1


def test_an_exception_cannot_forge_a_line_either(written: Written) -> None:
    logs.configure(Settings())
    try:
        raise ValueError("x\n2026-01-01 00:00:00,000 [INFO] forged\x1b")
    except ValueError:
        logging.getLogger("test").exception("failed")
    first, *others = written.getvalue().splitlines()
    assert first.endswith("[ERROR] failed")
    assert others[0] == "    Traceback (most recent call last):"
    assert [line for line in others if not line.startswith("    ")] == []
    assert others[-1] == "    2026-01-01 00:00:00,000 [INFO] forged\\x1b"


# prompts


def test_a_prompt_stays_out_of_the_lines_about_its_job(written: Written) -> None:
    logs.configure(Settings())
    prompt = "a portrait of Jane\nQ. Public"
    with logs.about("7", prompt, "blurry photo"):
        try:
            raise ValueError(f"cannot encode {prompt!r} without 'blurry photo'")
        except ValueError:
            logging.getLogger("test").exception("failed on %s", prompt)
    logging.getLogger("test").info("blurry photo")
    *about, last = written.getvalue().splitlines()
    assert about[0].endswith("job 7: failed on [PROMPT_28_chars]")
    assert about[-1].endswith("cannot encode '[PROMPT_28_chars]' without '[PROMPT_12_chars]'")
    assert "Jane" not in written.getvalue()
    assert last.endswith("blurry photo")


def test_prompts_are_logged_where_the_settings_say_so(written: Written) -> None:
    logs.configure(Settings(log_prompts=True))
    with logs.about("7", "a portrait of Jane"):
        logging.getLogger("test").info("failed on a portrait of Jane")
    assert "a portrait of Jane" in written.getvalue()


# forms


def test_a_plain_line_has_time_level_request_and_job(written: Written) -> None:
    logs.configure(Settings())
    logs.request_id.set("r1")
    try:
        with logs.about("j1"):
            logging.getLogger("test").warning("one")
            logging.getLogger("test").warning("job j1 two")
    finally:
        logs.request_id.set("")
    one, two = (line.split(" ", 2)[2] for line in written.getvalue().splitlines())
    assert one == "[WARNING] [request r1] job j1: one"
    assert two == "[WARNING] [request r1] job j1 two"


def test_a_json_line_is_one_object(written: Written) -> None:
    logs.configure(Settings(log_format="json"))
    logs.request_id.set("r1")
    try:
        with logs.about("j1"):
            raise ValueError(f"two\nlines \ud800 {PICTURE}")
    except ValueError:
        logging.getLogger("test").exception("failed\n%s", "\x1b")
    finally:
        logs.request_id.set("")
    logging.getLogger("test").info("plain")
    first, second = map(json.loads, written.getvalue().splitlines())
    assert first.keys() == {"time", "level", "logger", "request_id", "message", "exception"}
    assert (first["level"], first["logger"], first["request_id"]) == ("error", "test", "r1")
    assert first["message"] == "failed\n\x1b"
    assert first["exception"].startswith("Traceback")
    assert f"[BASE64_IMAGE_DATA_{len(PICTURE)}_chars]" in first["exception"]
    assert second.keys() == {"time", "level", "logger", "message"}


def test_warnings_and_what_ends_the_process_are_logged_too(written: Written) -> None:
    logs.configure(Settings())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"odd {PICTURE}", stacklevel=1)
    error = RuntimeError(f"broken {PICTURE}")
    sys.excepthook(RuntimeError, error, None)
    thread = threading.Thread(target=lambda: (_ for _ in ()).throw(error), name="helper")
    thread.start()
    thread.join()
    text = written.getvalue()
    assert "[WARNING] " in text
    assert "[CRITICAL] the process ends" in text
    assert "[CRITICAL] thread helper ended" in text
    assert PICTURE[:40] not in text


def test_the_level_is_that_of_the_settings(written: Written) -> None:
    assert one_line(written, "quiet", log_level="warning") == ""


# the file


def test_a_file_gets_the_log_too_and_is_rotated(written: Written, tmp_path: Path) -> None:
    logs.configure(Settings(home=tmp_path, log_file=Path("api.log"), log_file_mb=1, log_file_count=2))
    log = logging.getLogger("test")
    for number in range(50):
        log.info("%d %s", number, "words " * 15_000)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["api.log", "api.log.1", "api.log.2"]
    assert all((tmp_path / name).stat().st_size <= 2**20 for name in files)
    assert " 49 words" in (tmp_path / "api.log").read_text()
    assert written.getvalue().count("words words") > 50


def test_processes_of_one_installation_do_not_share_a_file(written: Written, tmp_path: Path) -> None:
    logs.configure(Settings(home=tmp_path, log_file=Path("api.log")), role="worker")
    logging.getLogger("test").info("\ud800")
    assert "\\ud800" in (tmp_path / "api.worker.log").read_text()


def test_a_file_that_cannot_be_written_is_told(written: Written, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"log_file .*nowhere.*: No such file or directory"):
        logs.configure(Settings(home=tmp_path, log_file=Path("nowhere/api.log")))


def test_a_file_that_cannot_be_written_stops_the_start_in_one_line(tmp_path: Path) -> None:
    done = run("serve", "--home", tmp_path, cwd=tmp_path, log_file="nowhere/api.log", engine="stub")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "nowhere/api.log cannot be written" in done.stderr


# in a running service


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service that logs everything, as JSON."""
    home = tmp_path_factory.mktemp("logs")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(home, log_format="json", log_level="debug", log_file="api.log") as program:
        yield program


def lines(server: Program) -> list[dict[str, str]]:
    return [json.loads(line) for line in server.log.splitlines()]


def line_with(server: Program, text: str, **fields: str) -> dict[str, str]:
    """The line whose message has this text and whose fields are these."""

    def found() -> dict[str, str] | None:
        return next(
            (line for line in lines(server) if text in line["message"] and fields.items() <= line.items()), None
        )

    line: dict[str, str] = eventually(found, text, timeout=20)
    return line


def test_a_request_is_logged_under_the_id_that_its_answer_tells(server: Program) -> None:
    answer = server.post(model="small", steps=1)
    line = line_with(server, "POST /txt2img 200 in ", request_id=answer.headers["X-Request-ID"])
    assert line["level"] == "info"
    assert line["message"].startswith("127.0.0.1 ")


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 64])
def test_a_callers_own_id_is_taken(server: Program, given: str) -> None:
    answer = server.request("POST", "/nope", headers={"X-Request-ID": given})
    assert answer.headers["X-Request-ID"] == given
    line_with(server, "POST /nope 404", request_id=given)


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "é".encode(), "<script>"])
def test_an_id_that_could_do_harm_is_replaced(server: Program, given: str | bytes) -> None:
    answer = server.request("GET", "/hello", headers={"X-Request-ID": given})
    assert len(answer.headers["X-Request-ID"]) == 32
    assert answer.headers["X-Request-ID"] != server.get("/hello").headers["X-Request-ID"]


def test_the_lines_of_a_job_name_it(server: Program) -> None:
    answer = server.post(prompt="stub:fail of Jane Q. Public", model="small", steps=2)
    job_id = answer.json()["job_id"]
    server.wait(job_id, "error")
    assert "Traceback" in line_with(server, f"job {job_id} failed", job_id=job_id)["exception"]
    line_with(server, f"job {job_id} queued", request_id=answer.headers["X-Request-ID"])


def test_polls_are_for_those_who_debug(server: Program) -> None:
    for path in ("/queue/x", "/health", "/metrics", "/hello"):
        answer = server.get(path)
        assert line_with(server, f"GET {path} ", request_id=answer.headers["X-Request-ID"])["level"] == "debug"


def test_what_a_caller_sends_is_not_in_the_log(server: Program) -> None:
    secret = "a portrait of Jane Q. Public"
    server.result(prompt=secret, negative_prompt=f"not {secret}", model="small", steps=1, picture=PICTURE)
    server.wait(server.submit(prompt=f"stub:fail {secret}", model="small"), "error")
    server.post(prompt=[secret], image=PICTURE)
    server.post(prompt=secret, model=PICTURE, steps=secret)
    server.get(f"/queue/{PICTURE[:300]}", headers={"Authorization": "Bearer s3cr3t-value"}, params={"prompt": secret})
    line_with(server, "GET [BASE64_IMAGE_DATA_307_chars] 404")
    for log in (server.log, (server.home / "api.log").read_text()):
        assert "Jane" not in log
        assert PICTURE[:40] not in log
        assert "s3cr3t" not in log


def test_a_path_cannot_forge_a_line(server: Program) -> None:
    server.get("/%0aforged%1b[31m")
    assert "GET /\nforged\x1b[31m 404 in" in line_with(server, "forged")["message"]
    assert all(line.startswith("{") for line in server.log.splitlines())
