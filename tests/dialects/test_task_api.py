"""The task API (document 004), asked from outside as its own tests and clients do."""

from __future__ import annotations

import io
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_models import diffusers_folder
from PIL import Image
from serving import ROOT, Program, eventually, serving
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from diffusion_api.blobs import name_of
from diffusion_api.server import build_app
from diffusion_api.settings import Settings

MODEL = "hf-internal-testing/tiny-stable-diffusion-pipe"
ASKED = {"model": MODEL, "prompt": "corgi wearing a top hat", "steps": 2, "safety_filter": False}
TXT2IMG = {"params_type": "txt2img", **ASKED}
FILLED = {"negative_prompt": None, "guidance": 7.5, "scheduler": "plms"}
SLOW = {**ASKED, "prompt": "stub:seconds=0.2", "steps": 100}
CANCELLED = "Task cancelled by user"
KEY = "the-key-of-an-admin"
CHECKER = ("config.json", "model.safetensors", "preprocessor_config.json")


def home_with_model(home: Path) -> Path:
    diffusers_folder(home / "stable_diffusion" / "models" / MODEL, sample_size=8)
    return home


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Open to everybody, as the original's tests have it."""
    home = home_with_model(tmp_path_factory.mktemp("public"))
    with serving(home, enable_public_access=1, enable_signup="yes", max_body=2**20) as program:
        yield program


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """On loopback without keys, and without any switch of the task API."""
    with serving(home_with_model(tmp_path_factory.mktemp("closed"))) as program:
        yield program


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """With a key of an admin, and open to new accounts."""
    with serving(home_with_model(tmp_path_factory.mktemp("keyed")), admin_api_key=KEY, enable_signup=1) as program:
        yield program


def public_token(server: Program) -> str:
    answer = server.request("POST", "/token/all")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"access_token": answer.json()["access_token"], "token_type": "bearer"}
    token: str = answer.json()["access_token"]
    return token


def account(server: Program, name: str) -> str:
    """The token of a new account."""
    assert server.request("POST", f"/user/{name}", params={"password": "pw"}).json() == {"username": name}
    answer = server.request("POST", "/token", data={"username": name, "password": "pw", "grant_type": "password"})
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["access_token"]
    return token


def bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def listening(server: Program, token: str, more: str = "", **options: Any) -> ClientConnection:
    address = f"{server.url.replace('http', 'ws')}/events?token={token}{more}"
    return connect(address, proxy=None, open_timeout=20, close_timeout=5, **options)


def told(socket: ClientConnection) -> dict[str, Any]:
    """The next event: JSON, in a string that is JSON."""
    text = json.loads(socket.recv(timeout=60))
    assert isinstance(text, str)
    event: dict[str, Any] = json.loads(text)
    return event


def began(server: Program, token: str | None = None, **params: Any) -> str:
    answer = server.request("POST", "/task", json=params, headers=bearer(token))
    assert answer.status_code == 200, answer.text
    task_id = answer.json()
    assert str(uuid.UUID(task_id, version=4)) == task_id
    return str(task_id)


def latest(server: Program, task_id: str, token: str | None = None) -> dict[str, Any]:
    answer = server.get(f"/task/{task_id}", headers=bearer(token))
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-cache, no-store"
    event: dict[str, Any] = answer.json()
    return event


def ended(server: Program, task_id: str, token: str | None = None) -> dict[str, Any]:
    event: dict[str, Any] = eventually(
        lambda: (e := latest(server, task_id, token))["event_type"] in ("finished", "aborted") and e, "the task's end"
    )
    return event


def finished(server: Program, task_id: str, token: str | None = None) -> dict[str, Any]:
    event = ended(server, task_id, token)
    assert event["event_type"] == "finished", event
    result: dict[str, Any] = event["result"]
    return result


def picture(level: int = 128, size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, kind)
    return file.getvalue()


def uploaded(server: Program, data: bytes | None = None, **options: Any) -> str:
    answer = server.request("POST", "/blob", files={"blob_data": ("any.name", data or picture())}, **options)
    assert answer.status_code == 200, answer.text
    url: str = answer.json()
    return url


def opened(server: Program, blob_url: str) -> httpx.Response:
    assert blob_url.startswith(f"{server.url}/blob/")
    return server.get(urlsplit(blob_url).path)


# the original's own tests


def test_a_picture_is_made_and_changed_and_painted_anew_while_events_tell_of_it(server: Program) -> None:
    token = public_token(server)

    def through(params: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
        with listening(server, token) as socket:
            task_id = began(server, token, **params)
            assert told(socket) == {"event_type": "pending", "task_id": task_id}
            assert told(socket) == {"event_type": "started", "task_id": task_id}
            event = told(socket)
            with pytest.raises(TimeoutError):
                socket.recv(timeout=0.3)
        result = event["result"]
        seed = result["parameters_used"]["seed"]
        assert isinstance(seed, int)
        assert event == {
            "event_type": "finished",
            "task_id": task_id,
            "result": {
                "blob_url": result["blob_url"],
                "parameters_used": {**expected, "seed": expected.get("seed", seed)},
            },
        }
        assert latest(server, task_id, token) == event
        answer = opened(server, result["blob_url"])
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).format == "PNG"
        return event

    made = through(TXT2IMG, {**TXT2IMG, **FILLED, "width": 512, "height": 512})
    image = made["result"]["blob_url"]
    assert Image.open(io.BytesIO(opened(server, image).content)).size == (512, 512)
    changed = {"params_type": "img2img", **ASKED, "initial_image": image, "seed": 42}
    through(changed, {**changed, **FILLED, "strength": 0.8})
    painted = {
        **ASKED,
        "params_type": "inpaint",
        "initial_image": uploaded(server),
        "mask": uploaded(server, picture(255)),
    }
    through(painted, {**painted, **FILLED})


def test_without_a_token_everybody_may_poll(server: Program) -> None:
    result = finished(server, began(server, **TXT2IMG))
    assert result["parameters_used"] == TXT2IMG | FILLED | {
        "width": 512, "height": 512, "seed": result["parameters_used"]["seed"],
    }  # fmt: skip
    changed = finished(server, began(server, **ASKED, initial_image=result["blob_url"], seed=42))
    assert changed["parameters_used"]["params_type"] == "img2img"
    assert changed["parameters_used"]["seed"] == 42


def test_a_synchronous_call_answers_with_the_picture(server: Program) -> None:
    answer = server.get("/txt2img", params={**TXT2IMG, "unknown": "ignored", "safety_filter": "false"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"blob_url", "parameters_used"}
    assert body["parameters_used"] == TXT2IMG | FILLED | {
        "width": 512, "height": 512, "seed": body["parameters_used"]["seed"],
    }  # fmt: skip
    assert opened(server, body["blob_url"]).status_code == 200
    assert latest(server, answer.headers["x-job-id"])["result"] == body


def test_a_task_that_is_cancelled_at_once_is_told_as_started_and_aborted(server: Program) -> None:
    token = public_token(server)
    with listening(server, token) as socket:
        first, waiting = began(server, token, **SLOW), began(server, token, **SLOW)
        for task_id in (waiting, first):
            answer = server.request("DELETE", f"/task/{task_id}", headers=bearer(token))
            assert (answer.status_code, answer.content) == (204, b"")
        events = [told(socket) for _ in range(6)]
    for task_id in (first, waiting):
        theirs = [event for event in events if event["task_id"] == task_id]
        aborted = {"event_type": "aborted", "task_id": task_id, "reason": CANCELLED}
        assert [event["event_type"] for event in theirs] == ["pending", "started", "aborted"]
        assert theirs[-1] == aborted
        assert latest(server, task_id, token) == aborted


def test_who_leaves_a_synchronous_call_cancels_it(server: Program) -> None:
    token = public_token(server)
    with listening(server, token) as socket:
        with pytest.raises(httpx.ReadTimeout):
            server.get("/txt2img", params=SLOW | {"token": token}, timeout=0.3)
        events = [told(socket) for _ in range(3)]
    assert [event["event_type"] for event in events] == ["pending", "started", "aborted"]
    assert events[-1]["reason"] == CANCELLED


# who may call


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            ("GET", path)
            for path in ("/txt2img?prompt=a", "/img2img?prompt=a", "/inpaint", "/task/1", "/compat/tasks/task/1")
        ),
        ("HEAD", "/txt2img?prompt=a"),
        ("DELETE", "/task/1"),
        ("POST", "/task"),
    ],
)
@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer a.b.c"}, {"Authorization": "Bearer nonsense"}])
def test_where_nobody_else_needs_a_credential_a_token_is_asked_for(
    closed: Program, method: str, path: str, sent: dict[str, str]
) -> None:
    answer = closed.request(method, path, headers=sent)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        assert answer.json() == {"detail": "Could not validate credentials"}
    assert closed.get("/queue").json()["jobs"] == []


def test_the_switches_are_off_where_nothing_is_said(closed: Program) -> None:
    answer = closed.request("POST", "/token/all")
    assert (answer.status_code, answer.json()) == (403, {"detail": "Public token is disabled"})
    for answer in (
        closed.request("POST", "/user/ann", params={"password": "pw"}),
        closed.request("POST", "/user", json={"username": "ann", "password": "pw"}),
    ):
        assert (answer.status_code, answer.json()) == (403, {"detail": "Signup is disabled"})


def test_an_account_is_made_once_and_its_password_opens_it(keyed: Program) -> None:
    assert keyed.request("POST", "/user", json={"username": "bob", "password": "pw"}).json() == {"username": "bob"}
    assert keyed.request("POST", "/user", data={"username": "cid", "password": "pw"}).json() == {"username": "cid"}
    assert keyed.request("POST", "/user/bob", params={"password": "other"}).status_code == 409
    assert keyed.request("POST", "/user/all", params={"password": "pw"}).status_code == 403
    assert keyed.request("POST", "/user/a b", params={"password": "pw"}).status_code == 422
    assert keyed.request("POST", "/user/dan").json()["detail"][0]["loc"] == ["body", "password"]
    assert keyed.request("POST", "/user", content=b"<x/>", headers={"Content-Type": "text/xml"}).status_code == 415
    for answer in (
        keyed.request("POST", "/token", data={"username": "bob", "password": "pw"}),
        keyed.request("POST", "/token/bob", data={"password": "pw"}),
        keyed.request("POST", "/token/bob", params={"password": "pw"}),
    ):
        assert answer.status_code == 200, answer.text
        assert finished(keyed, began(keyed, answer.json()["access_token"], **ASKED), answer.json()["access_token"])
    for answer in (
        keyed.request("POST", "/token", data={"username": "bob", "password": "other"}),
        keyed.request("POST", "/token", data={"username": "nobody", "password": "pw"}),
        keyed.request("POST", "/token/bob", params={"password": ""}),
    ):
        assert answer.status_code == 401
        assert answer.json() == {"detail": "Incorrect username or password"}
    assert "pw" not in json.loads((keyed.home / "access" / "users.json").read_text())["users"][0]["hash"].split("$")


def test_passwords_stay_out_of_answers_and_logs(keyed: Program) -> None:
    answer = keyed.request("POST", "/token", data={"password": "s3cret-of-eve"})
    assert answer.status_code == 422
    assert keyed.request("POST", "/user/eve", params={"password": "s3cret-of-eve"}).status_code == 200
    assert "s3cret" not in answer.text + keyed.log


def test_public_access_opens_the_task_api_and_nothing_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    diffusers_folder(home / "stable_diffusion" / "models" / "other", sample_size=8)
    with serving(home, enable_public_access=1, admin_api_key=KEY, model_fallback="default") as server:
        result = finished(server, began(server, **TXT2IMG))
        assert result["parameters_used"]["model"] == MODEL, "as it was named, whatever stood in for it"
        assert opened(server, uploaded(server)).status_code == 200
        for path in ("/models", "/queue", "/metrics"):
            assert server.get(path).status_code == 401
        assert server.request("POST", "/txt2img", json=ASKED).status_code == 401


def test_a_key_opens_the_task_api_and_listens_to_its_own(keyed: Program) -> None:
    sent = {"X-API-Key": KEY}
    with connect(f"{keyed.url.replace('http', 'ws')}/events", proxy=None, additional_headers=sent) as socket:
        task_id = keyed.request("POST", "/task", json=ASKED, headers=sent).json()
        assert [told(socket)["event_type"] for _ in range(3)] == ["pending", "started", "finished"]
    assert keyed.get(f"/task/{task_id}", headers=sent).json()["event_type"] == "finished"
    assert keyed.request("POST", "/blob", files={"blob_data": picture()}).status_code == 401
    assert opened(keyed, uploaded(keyed, headers=sent)).status_code == 200


def test_no_caller_meets_the_task_of_another(keyed: Program) -> None:
    mine, other = account(keyed, "fay"), account(keyed, "gil")
    with listening(keyed, other) as socket:
        task_id = began(keyed, mine, **SLOW)
        for method, path in (
            ("GET", f"/task/{task_id}"),
            ("DELETE", f"/task/{task_id}"),
            ("GET", f"/compat/tasks/task/{task_id}"),
            ("DELETE", f"/compat/tasks/task/{task_id}"),
        ):
            answer = keyed.request(method, path, headers=bearer(other))
            assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})
        for path in (f"/queue/{task_id}", f"/queue/{task_id}/image", f"/queue/{task_id}/events"):
            assert keyed.get(path, headers=bearer(other)).status_code == 404
        assert keyed.get("/queue", headers=bearer(other)).json()["jobs"] == []
        assert latest(keyed, task_id, mine)["event_type"] in ("pending", "started")
        assert keyed.request("DELETE", f"/task/{task_id}", headers=bearer(mine)).status_code == 204
        assert ended(keyed, task_id, mine)["reason"] == CANCELLED
        with pytest.raises(TimeoutError):
            socket.recv(timeout=0.5)


def test_two_tokens_of_one_caller_hear_of_their_own_tasks_only(server: Program) -> None:
    one, two = public_token(server), public_token(server)
    with listening(server, one) as first, listening(server, one) as again, listening(server, two) as second:
        task_id = began(server, one, **ASKED)
        for socket in (first, again):
            assert [told(socket)["task_id"] for _ in range(3)] == [task_id] * 3
        with pytest.raises(TimeoutError):
            second.recv(timeout=0.3)
    assert latest(server, task_id, two)["event_type"] == "finished"


@pytest.mark.parametrize("query", ["", "?token=", "?token=a.b.c", "?token=nonsense"])
def test_nobody_listens_without_a_token(server: Program, query: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{server.url.replace('http', 'ws')}/events{query}", proxy=None)
    assert refused.value.response.status_code == 403


def test_pages_of_other_sites_do_not_listen(server: Program) -> None:
    token, port = public_token(server), urlsplit(server.url).port
    with pytest.raises(InvalidStatus) as refused:
        listening(server, token, additional_headers={"Origin": "https://evil.example"})
    assert refused.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as refused:  # a name of theirs that means this machine
        connect(f"ws://evil.example:{port}/events?token={token}", address=("127.0.0.1", port), proxy=None)
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    "path", ["/txt2img?prompt=a", "/img2img?prompt=a", "/inpaint", "/task/1", "/compat/tasks/txt2img?prompt=a"]
)
def test_pages_of_other_sites_begin_nothing(server: Program, path: str) -> None:
    before = server.get("/queue", headers=bearer(None)).json()["jobs"]
    answer = server.get(path, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403
    assert server.get("/queue").json()["jobs"] == before


def test_asking_for_the_head_makes_no_picture(server: Program) -> None:
    before = server.get("/queue").json()["jobs"]
    assert server.request("HEAD", "/txt2img", params=ASKED).status_code == 405
    assert server.get("/queue").json()["jobs"] == before


# what a task may be


@pytest.mark.parametrize(
    ("params", "loc"),
    [
        ({**ASKED, "cfg_scale": 7}, ["body", "cfg_scale"]),
        ({**ASKED, "strength": 0.5}, ["body", "strength"]),
        ({**ASKED, "params_type": "txt2img", "initial_image": "http://a/b"}, ["body", "initial_image"]),
        ({"steps": 2}, ["body", "prompt"]),
        ({**ASKED, "params_type": "video"}, ["body"]),
        ({**ASKED, "params_type": ["txt2img"]}, ["body"]),
        ({**ASKED, "mask": "http://a/b"}, ["body", "initial_image"]),
        ({**ASKED, "scheduler": "euler"}, ["body", "scheduler"]),
        ({**ASKED, "guidance": 0.5}, ["body", "guidance"]),
        ({**ASKED, "steps": 0}, ["body", "steps"]),
        ({**ASKED, "steps": 100_000}, ["body", "steps"]),
        ({**ASKED, "width": 1}, ["body", "width"]),
        ({**ASKED, "seed": 2**32}, ["body", "seed"]),
        ({**ASKED, "model": "no-such-model"}, ["body", "model"]),
        ([], ["body"]),
        ("txt2img", ["body"]),
    ],
)
def test_what_is_wrong_with_a_task_is_listed(server: Program, params: Any, loc: list[str]) -> None:
    answer = server.request("POST", "/task", json=params)
    assert answer.status_code == 422, answer.text
    assert set(answer.json()) == {"detail"}
    flaws = answer.json()["detail"]
    assert all(set(flaw) == {"loc", "msg", "type"} for flaw in flaws)
    assert [flaw["loc"] for flaw in flaws] == [loc]


def test_a_body_of_another_type_is_refused(server: Program) -> None:
    answer = server.request("POST", "/task", content=json.dumps(ASKED), headers={"Content-Type": "text/plain"})
    assert (answer.status_code, set(answer.json())) == (415, {"detail"})
    assert server.request("POST", "/blob", json={}).status_code == 415
    assert server.request("POST", "/token", json={}).status_code == 415


@pytest.mark.parametrize(
    ("scheduler", "sampler"), [("plms", "plms"), ("ddim", "ddim"), ("k-lms", "lms"), (None, "plms")]
)
def test_a_scheduler_is_the_sampler_of_that_name(server: Program, scheduler: str | None, sampler: str) -> None:
    task_id = began(server, **ASKED, **({"scheduler": scheduler} if scheduler else {}))
    finished(server, task_id)
    record = json.loads((server.home / "queue" / "done" / f"{task_id}.json").read_text())
    assert (record["request"]["sampler"], record["request"]["schedule"]) == (sampler, "default")


def test_the_size_is_told_as_given_and_the_model_as_used(server: Program) -> None:
    result = finished(server, began(server, prompt="a", steps=1, width=100, height=61))
    used = result["parameters_used"]
    assert (used["width"], used["height"], used["params_type"]) == (100, 61, "txt2img")
    assert Image.open(io.BytesIO(opened(server, result["blob_url"]).content)).size == (104, 64)
    assert used["model"] == server.get("/models").json()["models"][0]["name"]


def test_the_same_key_begins_one_task(server: Program) -> None:
    token, sent = public_token(server), {"Idempotency-Key": "once"}
    ids = {server.request("POST", "/task", json=ASKED, headers=sent | bearer(token)).json() for _ in range(2)}
    assert len(ids) == 1


def test_a_native_job_is_no_task(server: Program) -> None:
    job_id = server.submit(prompt="a", steps=1)
    answer = server.get(f"/task/{job_id}")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})


def test_a_task_that_is_not_there_is_not_found(server: Program) -> None:
    for method in ("GET", "DELETE"):
        answer = server.request(method, f"/task/{uuid.uuid4()}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})


def test_a_task_that_has_ended_is_not_cancelled(server: Program) -> None:
    task_id = began(server, **ASKED)
    before = ended(server, task_id)
    assert server.request("DELETE", f"/task/{task_id}").status_code == 204
    assert latest(server, task_id) == before


def test_a_task_that_fails_says_why(server: Program) -> None:
    event = ended(server, began(server, **{**ASKED, "prompt": "stub:fail=1"}))
    assert event["reason"].startswith("Internal error: ")
    assert set(event) == {"event_type", "task_id", "reason"}
    answer = server.get("/txt2img", params={**ASKED, "prompt": "stub:fail=1"})
    assert (answer.status_code, set(answer.json())) == (500, {"detail"})
    assert answer.json()["detail"].startswith("Internal error: ")


# pictures


def test_the_white_part_of_the_mask_is_painted_anew(server: Program) -> None:
    initial, mask = picture(100), picture(255)
    task_id = began(server, **ASKED, initial_image=uploaded(server, initial), mask=uploaded(server, mask))
    finished(server, task_id)
    asked = json.loads((server.home / "queue" / "done" / f"{task_id}.json").read_text())["request"]
    assert (asked["image"], asked["mask"]["image"]) == (name_of(initial), name_of(mask))
    assert (asked["mask"]["invert"], asked["mask"]["fill"], asked["width"], asked["height"]) == (
        False,
        "original",
        64,
        64,
    )


def test_an_uploaded_picture_may_be_named_on_the_other_routes_too(server: Program) -> None:
    answer = server.request("POST", "/img2img", json={"prompt": "a", "steps": 1, "image": uploaded(server)})
    assert server.wait(answer.json()["job_id"])["state"] == "done"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/corgi.png",
        "file:///etc/passwd",
        "not a URL",
        "",
        "{server}/blob/nonsense",
        "{server}/blob/" + "0" * 64 + ".0." + "0" * 64,
    ],
)
def test_a_bad_picture_aborts_its_task_and_the_next_one_runs(server: Program, url: str) -> None:
    token = public_token(server)
    with listening(server, token) as socket:
        task_id = began(server, token, **ASKED, initial_image=url.format(server=server.url))
        events = [told(socket) for _ in range(3)]
        assert [event["event_type"] for event in events] == ["pending", "started", "aborted"]
        assert events[-1]["reason"].startswith("Internal error: initial_image")
        assert latest(server, task_id, token) == events[-1]
        began(server, token, **ASKED)
        assert [told(socket)["event_type"] for _ in range(3)] == ["pending", "started", "finished"]
    answer = server.get("/img2img", params={**ASKED, "initial_image": url.format(server=server.url)})
    assert answer.status_code == 422
    assert [flaw["loc"] for flaw in answer.json()["detail"]] == [["query", "initial_image"]]
    assert f"Internal error: {answer.json()['detail'][0]['msg']}" == events[-1]["reason"]


def test_a_mask_of_another_size_aborts_its_task(server: Program) -> None:
    mask = uploaded(server, picture(size=(32, 32)))
    event = ended(server, began(server, **ASKED, initial_image=uploaded(server), mask=mask))
    assert "32x32" in event["reason"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_blob_comes_back_as_it_was(server: Program, kind: str) -> None:
    data = picture(kind=kind)
    answer = opened(server, uploaded(server, data))
    assert answer.content == data
    assert answer.headers["content-type"] == f"image/{kind.lower()}"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_only_pictures_within_the_limits_are_taken(server: Program) -> None:
    answer = server.request("POST", "/blob", files={"blob_data": b"<script>alert(1)</script>"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "blob_data"]
    assert server.request("POST", "/blob", files={"blob_data": bytes(2**20)}).status_code == 413
    assert server.request("POST", "/blob", files={"other": picture()}).status_code == 422
    huge = Image.new("1", (8000, 8000))
    file = io.BytesIO()
    huge.save(file, "PNG")
    answer = server.request("POST", "/blob", files={"blob_data": file.getvalue()})
    assert (answer.status_code, set(answer.json())) == (413, {"detail"})


def test_a_link_that_was_changed_opens_nothing(server: Program) -> None:
    url = uploaded(server)
    name, expires, mac = url.rpartition("/")[2].split(".")
    for token in ("x", f"{name}.0.{mac}", f"{name}.{int(expires) + 1}.{mac}", f"{'0' * 64}.{expires}.{mac}", mac):
        answer = server.get(f"/blob/{token}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Blob not found"})


def test_the_filter_is_told_as_it_was_applied(tmp_path: Path) -> None:
    home = home_with_model(tmp_path)
    (home / "stable_diffusion" / "safety_checker").mkdir()
    for name in CHECKER:
        (home / "stable_diffusion" / "safety_checker" / name).write_bytes(b"{}")
    unsafe = {**ASKED, "prompt": "stub:unsafe", "seed": 1}
    with serving(home, enable_public_access=1) as server:
        checked = finished(server, began(server, **unsafe | {"safety_filter": True}))
        unchecked = finished(server, began(server, **unsafe))
    assert [result["parameters_used"]["safety_filter"] for result in (checked, unchecked)] == [True, False]


# events, in the ways that are asked for


def test_events_come_plain_and_with_progress_where_that_is_asked_for(server: Program) -> None:
    token = public_token(server)
    with listening(server, token, "&format=json&progress=1") as socket, listening(server, token) as other:
        began(server, token, **{**ASKED, "prompt": "stub:seconds=0.3", "steps": 6})
        events = []
        while not events or events[-1]["event_type"] != "finished":
            events.append(json.loads(socket.recv(timeout=60)))
        assert [told(other)["event_type"] for _ in range(3)] == ["pending", "started", "finished"]
    progress = [event["progress"] for event in events if event["event_type"] == "progress"]
    assert len(progress) >= 3
    assert progress == sorted(progress)
    assert [e["event_type"] for e in events if e["event_type"] != "progress"] == ["pending", "started", "finished"]
    assert set(events[2]) == {"event_type", "task_id", "progress", "step", "steps"}


def test_what_was_before_is_not_told_again(server: Program) -> None:
    token = public_token(server)
    ended(server, began(server, token, **ASKED), token)
    running = began(server, token, **{**ASKED, "prompt": "stub:seconds=0.3", "steps": 8})
    eventually(lambda: latest(server, running, token)["event_type"] == "started", "the start")
    with listening(server, token) as socket:
        socket.send("words that nobody asked for")
        event = told(socket)
        assert (event["event_type"], event["task_id"]) == ("finished", running)


def test_a_socket_that_leaves_is_let_go_of(server: Program) -> None:
    import psutil

    process, token = psutil.Process(server.process.pid), public_token(server)
    before = process.num_fds()
    for _ in range(10):
        with listening(server, token), listening(server, token) as other:
            other.socket.shutdown(2)  # without a word
    eventually(lambda: process.num_fds() <= before + 2, "the sockets to be closed")
    assert finished(server, began(server, token, **ASKED), token)


def test_sockets_count_as_connections_of_their_client(tmp_path: Path) -> None:
    with serving(
        home_with_model(tmp_path), enable_public_access=1, max_connections_per_client=3, trusted_proxies=""
    ) as few:
        token = public_token(few)
        with listening(few, token), listening(few, token), listening(few, token):
            assert few.get("/hello").status_code == 429
        eventually(lambda: few.get("/hello").status_code == 200, "room for one more")


def test_a_service_that_stops_does_not_wait_for_those_who_listen(tmp_path: Path) -> None:
    with serving(home_with_model(tmp_path), enable_public_access=1) as one:
        with listening(one, public_token(one)) as socket:
            one.signal(15)
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=60)
            assert one.ended() == 0
        assert "Traceback" not in one.log


# what outlasts the process


def test_accounts_blobs_tokens_and_tasks_outlast_a_restart(tmp_path: Path) -> None:
    home = home_with_model(tmp_path)
    with serving(home, enable_signup=1) as before:
        token = account(before, "ann")
        blob = urlsplit(uploaded(before)).path
        done = began(before, token, **ASKED)
        result = finished(before, done, token)
        waits = began(before, token, **SLOW)
        before.kill()
    with serving(home) as after:
        assert after.get(blob).status_code == 200
        assert after.get(urlsplit(result["blob_url"]).path).status_code == 200
        assert latest(after, done, token)["result"]["parameters_used"] == result["parameters_used"]
        assert after.request("POST", "/token", data={"username": "ann", "password": "pw"}).status_code == 200
        with listening(after, token) as socket:
            after.request("DELETE", f"/task/{waits}", headers=bearer(token))
            event = told(socket)
            while event["event_type"] == "started":
                event = told(socket)
            assert event == {"event_type": "aborted", "task_id": waits, "reason": CANCELLED}


def test_a_token_ends_with_its_account_and_with_the_switch(tmp_path: Path) -> None:
    home = home_with_model(tmp_path)
    with serving(home, enable_public_access=1, enable_signup=1) as before:
        tokens = [public_token(before), account(before, "ann")]
    with serving(home) as after:
        (home / "access" / "users.json").unlink()
        for token in tokens:
            assert after.request("POST", "/task", json=ASKED, headers=bearer(token)).status_code == 401


def test_a_blob_expires(tmp_path: Path) -> None:
    with serving(home_with_model(tmp_path), enable_public_access=1, keep_blobs_hours=2 / 3600) as brief:
        url = urlsplit(uploaded(brief)).path
        assert brief.get(url).status_code == 200
        eventually(lambda: brief.get(url).status_code == 404, "the blob to expire")


def test_neither_tokens_nor_links_are_in_the_log(tmp_path: Path) -> None:
    with serving(home_with_model(tmp_path), enable_public_access=1, log_level="debug") as server:
        token = public_token(server)
        with listening(server, token) as socket:
            task_id = began(server, token, **ASKED, initial_image=uploaded(server))
            events = [told(socket) for _ in range(3)]
        url = events[-1]["result"]["blob_url"]
        assert opened(server, url).status_code == 200
        assert server.get("/txt2img", params=ASKED | {"token": token}).status_code == 200
        assert task_id in server.log
        assert token not in server.log
        assert url.rpartition(".")[2] not in server.log


# the link of the start, and what the document prints


def test_the_link_of_the_start_makes_a_picture(tmp_path: Path) -> None:
    home = home_with_model(tmp_path)
    shutil.copy(ROOT / ".env.example", home / ".env")
    with serving(home) as server:
        link = server.said.partition("Try visiting ")[2].split()[0]
        assert link.startswith(f"{server.url}/txt2img?prompt=corgi&steps=20&model=tiny-stable-diffusion-pipe&")
        answer = server.get(link.removeprefix(server.url), headers={"Sec-Fetch-Site": "none"})
        assert answer.status_code == 200, answer.text
    with serving(home, print_link_with_token=1):
        users = json.loads((home / "access" / "users.json").read_text())["users"]
    assert [user["name"].startswith("default_") for user in users] == [True]


def test_the_link_is_printed_under_uvicorn_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_app(Settings(home=tmp_path, engine="stub", print_link_with_token=True, public_url="https://box.example/sd"))
    assert capsys.readouterr().out.startswith("Try visiting https://box.example/sd/txt2img?prompt=corgi&steps=20&")


def test_the_link_as_the_document_prints_it_works(server: Program) -> None:
    answer = server.get(f"/txt2img?prompt=corgi&steps=5?token={public_token(server)}")
    assert answer.status_code == 200, answer.text
    assert answer.json()["parameters_used"]["steps"] == 5


def test_the_url_of_the_service_is_that_of_its_links(tmp_path: Path) -> None:
    with serving(home_with_model(tmp_path), enable_public_access=1, public_url="https://box.example/sd") as server:
        server.url = re.findall(r"it listens on (\S+)", server.log)[-1]
        url = uploaded(server)
        assert url.startswith("https://box.example/sd/blob/")
        assert finished(server, began(server, **ASKED, initial_image=url))["blob_url"].startswith(
            "https://box.example/sd/blob/"
        )
