"""What holds for every dialect: its routes make jobs that last, refuse in its own words, and let in whom they should.

A dialect joins with a row for each of its routes in :data:`ROUTES`.
"""

from __future__ import annotations

import base64
import io
import re
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from fake_models import diffusers_folder
from PIL import Image
from serving import PATIENCE, Program, eventually, serving

from diffusion_api.keys import Keyring
from diffusion_api.schema.caller import Role

Fields: TypeAlias = dict[str, Any]

UNKNOWN = "org/never-installed"
NOBODYS = f"{uuid.UUID(int=0)}"


def photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


PHOTO = base64.b64encode(photo()).decode()
NATIVE = {"prompt": "a lighthouse", "model": "small", "steps": 1}
DRAWN = {"prompt": "a lighthouse", "width": 256, "height": 256, "num_inference_steps": 1}
CONFIG = DRAWN | {"model_id": "small", "width": 64, "height": 64}
TASK = {"prompt": "a lighthouse", "model": "small", "steps": 1}
FILE = {"image": ("photo.png", photo(), "image/png")}


@dataclass(frozen=True)
class Route:
    """A route that makes jobs. ``sent`` is a request that makes one, ``where`` the option that has its fields; ``wrong`` are
    fields that it refuses with ``status``, in the words of ``said``. ``waits`` says that it answers with the job's end, and
    ``cancels`` that who hangs up before that cancels the job. ``model`` is what it calls its model, where it asks for one.
    """

    dialect: str
    name: str
    sent: Fields
    wrong: Fields
    said: str
    where: str = "json"
    status: int = 400
    waits: bool = True
    cancels: bool = False
    model: str | None = None
    beside: Fields = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The method."""
        return self.name.split()[0]

    @property
    def path(self) -> str:
        """The path at the root."""
        return self.name.split()[1]

    def ask(
        self,
        server: Program,
        changed: Fields | None = None,
        *,
        path: str = "",
        timeout: float = PATIENCE,
        **headers: str,
    ) -> httpx.Response:
        """The answer to ``sent``, with some fields changed; at another ``path`` if one is given."""
        fields = {name: blob(server) if value is BLOB else value for name, value in self.sent.items()} | (changed or {})
        options = {self.where: fields, **self.beside, "headers": headers, "timeout": timeout}
        return server.request(self.method, path or self.path, **options)

    @property
    def alone(self) -> str:
        """The path where the dialect is alone."""
        return f"/compat/{MOUNTS.get(self.dialect, self.dialect)}{self.path}"


BLOB = "the URL of a stored picture"


@cache
def _blob(url: str, key: str) -> str:
    answer = httpx.post(f"{url}/blob", files={"blob_data": photo()}, headers={"X-API-Key": key}, trust_env=False)
    assert answer.status_code == 200, answer.text
    return str(answer.json())


def blob(server: Program) -> str:
    """A picture for tasks that begin with one."""
    return _blob(server.url, server.key)


STEPS = "steps is 0"
ROUTES = [
    Route("native", "POST /txt2img", NATIVE, {"steps": 0}, STEPS, waits=False, model="model"),
    Route("native", "POST /img2img", NATIVE | {"image": PHOTO}, {"steps": 0}, STEPS, waits=False, model="model"),
    Route(
        "native", "POST /inpaint", NATIVE | {"image": PHOTO, "mask": PHOTO}, {"steps": 0}, STEPS,
        waits=False, model="model",
    ),
    Route("native", "POST /upscale", {"image": PHOTO, "upscaler": "Lanczos"}, {"upscaler": "x"}, "'x'", waits=False),
    Route("backend", "POST /generate", DRAWN, {"num_inference_steps": 0}, "num_inference_steps is 0: it may be 1 to 100"),
    Route("backend", "POST /generate/batch", DRAWN | {"prompts": ["a lighthouse"]}, {"prompts": 3}, "prompts is 3"),
    Route("config", "POST /post_config", CONFIG, {"num_inference_steps": 0}, "num_inference_steps", "params", 422,
          model="model_id"),
    Route("config", "POST /post_config", CONFIG, {"num_inference_steps": 0}, "num_inference_steps", "params", 422,
          model="model_id", beside={"files": FILE}),
    Route("tasks", "POST /task", TASK, {"steps": 0}, "steps", status=422, waits=False, model="model"),
    Route("tasks", "POST /task", TASK | {"initial_image": BLOB}, {"steps": 0}, "steps", status=422, waits=False,
          model="model"),
    Route("tasks", "GET /txt2img", TASK, {"steps": 0}, "steps", "params", 422, cancels=True, model="model"),
    Route("tasks", "GET /img2img", TASK | {"initial_image": BLOB}, {"steps": 0}, "steps", "params", 422,
          cancels=True, model="model"),
    Route("tasks", "GET /inpaint", TASK | {"initial_image": BLOB, "mask": BLOB}, {"steps": 0}, "steps", "params",
          422, cancels=True, model="model"),
    Route("unidiffuser", "POST /prompt2img", {"prompt": "a lighthouse", "num_inference_steps": 1},
          {"num_inference_steps": 0}, "num_inference_steps", "params", 422),
    Route("unidiffuser", "POST /img2prompt", {"num_inference_steps": 1}, {"num_inference_steps": 0},
          "num_inference_steps", "params", 422, beside={"files": FILE}),
    Route("unidiffuser", "POST /img2embed", {"seed": 1}, {"seed": 2**40}, "seed", "params", 422, beside={"files": FILE}),
]  # fmt: skip
WAITING = [route for route in ROUTES if route.waits]
BODIED = [route for route in ROUTES if route.where == "json" or "files" in route.beside]
MODELLED = [route for route in ROUTES if route.model]
MOUNTS = {"native": "diffusionapi", "config": "sd"}
"""Names under ``/compat`` that are not the dialect's."""
BODY = {"native": {"status", "detail", "error"}}
"""The keys of a refusal where they are not ``detail`` alone."""


def called(route: Route) -> str:
    return (
        f"{route.name}{' with a picture' if {'files', 'image', 'initial_image'} & {*route.sent, *route.beside} else ''}"
    )


each_route = pytest.mark.parametrize("route", ROUTES, ids=called)
each_that_waits = pytest.mark.parametrize("route", WAITING, ids=called)


def home_of(folder: Path) -> Path:
    """An installation of a small model and a UniDiffuser."""
    models = folder / "stable_diffusion" / "models"
    diffusers_folder(models / "small", sample_size=8)
    diffusers_folder(
        models / "unidiffuser-v1", pipeline="UniDiffuserPipeline", index={"unet": ["unidiffuser", "UniDiffuserModel"]}
    )
    return folder


KEYS: dict[str, str] = {}
"""Those of ann, bob and the admin boss."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with keys; ann asks where nobody else is named."""
    home = home_of(tmp_path_factory.mktemp("contract"))
    keyring = Keyring(home / "access")
    KEYS.update(
        {name: keyring.add(name, Role.ADMIN if name == "boss" else Role.USER) for name in ("ann", "bob", "boss")}
    )
    with serving(home, model="small", secret_key="s" * 64) as program:
        program.key = KEYS["ann"]
        yield program


def job_of(answer: httpx.Response) -> str:
    assert answer.is_success, answer.text
    return answer.headers["X-Job-Id"]


def refusal(answer: httpx.Response, route: Route) -> str:
    """What a refusal in the words of the route's dialect says."""
    assert answer.json().keys() == BODY.get(route.dialect, {"detail"}), answer.text
    return str(answer.json()["detail"])


def paused(server: Program) -> None:
    assert server.request("POST", "/queue/pause", headers={"X-API-Key": KEYS["boss"]}).json()["paused"] is True


def resumed(server: Program) -> None:
    assert server.request("POST", "/queue/resume", headers={"X-API-Key": KEYS["boss"]}).json()["paused"] is False


def test_every_route_that_makes_jobs_is_here(server: Program) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    making = {
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method, operation in methods.items()
        if any(parameter["name"] == "Idempotency-Key" for parameter in operation.get("parameters", ()))
    }
    assert making - {route.name for route in ROUTES} == {"POST /queue/{job_id}/reproduce"}


# The job behind each


@each_route
def test_the_answer_names_the_job(server: Program, route: Route) -> None:
    for path in (route.path, route.alone):
        job_id = job_of(route.ask(server, path=path))
        assert server.wait(job_id)["job_id"] == job_id


@each_route
def test_a_key_makes_one_job_however_often_it_is_sent(server: Program, route: Route) -> None:
    key = f"{called(route)}".replace(" ", "")
    first, again = (route.ask(server, **{"Idempotency-Key": key}) for _ in range(2))
    assert job_of(again) == job_of(first)
    assert again.content == first.content
    bobs = route.ask(server, **{"Idempotency-Key": key, "X-API-Key": KEYS["bob"]})
    assert job_of(bobs) != job_of(first)
    other = {"seed": 77} if "upscaler" not in route.sent else {"upscaler": "Nearest"}
    refused = route.ask(server, other, **{"Idempotency-Key": key})
    assert refused.status_code == 422
    assert "Idempotency-Key" in refusal(refused, route)


@each_that_waits
def test_the_answer_may_be_left_for_later(server: Program, route: Route) -> None:
    answer = route.ask(server, Prefer="respond-async")
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "respond-async")
    assert server.wait(job_of(answer))["state"] == "done"
    if "Location" in answer.headers:
        assert server.get(answer.headers["Location"]).json()["job_id"] == job_of(answer)


@each_that_waits
def test_who_hangs_up_leaves_the_job_or_cancels_it_as_the_dialect_has_it(server: Program, route: Route) -> None:
    paused(server)
    try:
        with pytest.raises(httpx.ReadTimeout):
            route.ask(server, timeout=0.5)
        (row,) = server.get("/queue", params={"limit": 1}).json()["jobs"]
        if route.cancels:
            eventually(lambda: server.status(row["job_id"]).get("cancelled"), "the job to be cancelled")
    finally:
        resumed(server)
    if not route.cancels:
        server.wait(row["job_id"])


def test_a_job_of_each_route_outlives_the_process(tmp_path: Path) -> None:
    home = home_of(tmp_path)
    settings: Fields = {"model": "small", "enable_public_access": 1, "secret_key": "s" * 64}
    with serving(home, **settings) as server:
        assert server.request("POST", "/queue/pause").status_code == 200
        jobs = {called(route): job_of(route.ask(server, Prefer="respond-async")) for route in ROUTES}
        server.kill()
    with serving(home, **settings) as server:
        assert {server.status(job_id)["state"] for job_id in jobs.values()} == {"queued"}
        server.request("POST", "/queue/resume")
        for job_id in jobs.values():
            server.wait(job_id)
        server.kill()
    with serving(home, **settings) as server:
        for name, job_id in jobs.items():
            assert server.status(job_id)["state"] == "done", name


def test_a_service_that_stops_names_the_jobs_that_go_on_later(tmp_path: Path) -> None:
    with (
        serving(home_of(tmp_path), model="small", enable_public_access=1, secret_key="s" * 64) as server,
        ThreadPoolExecutor(len(WAITING)) as pool,
    ):
        server.request("POST", "/queue/pause")
        answers = [pool.submit(route.ask, server) for route in WAITING]
        eventually(lambda: len(server.get("/queue").json()["jobs"]) == len(WAITING), "all jobs")
        server.signal(signal.SIGTERM)
        for route, waiting in zip(WAITING, answers, strict=True):
            answer = waiting.result()
            if route.path == "/generate/batch":
                (item,) = answer.json()["results"]
                assert not item["success"]
                assert f"GET /queue/{item['job_id']}" in item["error"]
            else:
                assert answer.status_code == 503, called(route)
                assert f"GET /queue/{answer.headers['X-Job-Id']}" in refusal(answer, route)


# What is refused


@each_route
def test_a_wrong_field_is_refused_in_the_dialects_words(server: Program, route: Route) -> None:
    for path in (route.path, route.alone):
        answer = route.ask(server, route.wrong, path=path)
        assert answer.status_code == route.status
        assert route.said in refusal(answer, route)


@pytest.mark.parametrize("route", MODELLED, ids=called)
def test_a_model_that_is_not_installed_is_refused_with_the_choices(server: Program, route: Route) -> None:
    answer = route.ask(server, {str(route.model): UNKNOWN})
    assert answer.status_code == route.status
    assert re.search(rf"'{UNKNOWN}' is not installed; one of.*small", refusal(answer, route))


@pytest.mark.parametrize("route", BODIED, ids=called)
def test_bytes_that_are_no_body_are_refused(server: Program, route: Route) -> None:
    kinds = {"json": "application/json", "params": "multipart/form-data; boundary=x"}
    for content in (b"{", b"\xff", b"[" * 2000):
        answer = server.request("POST", route.path, content=content, headers={"Content-Type": kinds[route.where]})
        assert 400 <= answer.status_code < 500, answer.text
        refusal(answer, route)


def test_a_model_may_be_stood_in_for_in_each_dialect(tmp_path: Path) -> None:
    settings: Fields = {"model": "small", "enable_public_access": 1, "model_fallback": "default"}
    with serving(home_of(tmp_path), **settings) as server:
        for route in MODELLED:
            job_id = job_of(route.ask(server, {str(route.model): UNKNOWN}, Prefer="respond-async"))
            warned = server.wait(job_id).get("warnings", [])
            assert f"model '{UNKNOWN}' is not installed: 'small' was used in its place" in warned, called(route)


# Who may


@each_route
def test_nobody_makes_a_job_without_a_key(server: Program, route: Route) -> None:
    blob(server)
    before = server.get("/queue", headers={"X-API-Key": KEYS["boss"]}).json()["jobs"][:1]
    for path in (route.path, route.alone):
        answer = route.ask(server, path=path, **{"X-API-Key": ""})
        assert answer.status_code == 401
        assert isinstance(answer.json()["detail"], str)
    assert server.get("/queue", headers={"X-API-Key": KEYS["boss"]}).json()["jobs"][:1] == before


def test_no_caller_meets_a_job_of_another_whichever_route_made_it(server: Program) -> None:
    bob = {"X-API-Key": KEYS["bob"]}
    jobs = {called(route): job_of(route.ask(server)) for route in ROUTES}
    for job_id in jobs.values():
        server.wait(job_id)
    paths = server.get("/openapi.json").json()["paths"]
    of_jobs = [(path, method.upper()) for path in paths if "{" in path for method in paths[path]]
    assert ("/task/{task_id}", "DELETE") in of_jobs
    listed = "".join(server.get(path, headers=bob).text for path in paths if "{" not in path and "get" in paths[path])
    for name, job_id in jobs.items():
        assert job_id not in listed
        for path, method in of_jobs:
            theirs, nobodys = (
                server.request(method, re.sub(r"\{\w+\}", each, path).replace("image/" + each, "image/0"), headers=bob)
                for each in (job_id, NOBODYS)
            )
            assert theirs.status_code == nobodys.status_code, (name, method, path)
            assert theirs.text.replace(job_id, NOBODYS) == nobodys.text, (name, method, path)
        assert server.status(job_id)["state"] == "done"
