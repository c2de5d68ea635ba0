"""Who may call, asked of a real service: nothing answers without a key, and nobody meets the job of another."""

from __future__ import annotations

import base64
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_models import diffusers_folder
from serving import Program, eventually, serving
from starlette.routing import BaseRoute, Mount

from diffusion_api.access import Access, asks_for_token
from diffusion_api.keys import Keyring
from diffusion_api.schema.caller import Caller, Role
from diffusion_api.server import build_app
from diffusion_api.settings import Settings
from diffusion_api.users import Users

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")

OPEN = {
    "/",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    "/openapi.json",
    "/hello",
    "/health",
    "/ready",
    "/image/{link}",
    "/blob/{token}",
}
"""What answers GET without a key, beside the files of the documentation."""

NOBODYS = f"{uuid.UUID(int=0)}"
MISSING = "Missing API key. Provide X-API-Key header."


@dataclass
class Keyed:
    """A service with keys, and the keys."""

    server: Program
    keys: dict[str, str]

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        """The answer to somebody, named by the key."""
        headers = options.pop("headers", {}) | ({"X-API-Key": self.keys[key]} if key else {})
        return self.server.request(method, path, headers=headers, **options)

    def submit(self, key: str, **fields: Any) -> str:
        """The id of a job of somebody."""
        answer = self.ask("POST", "/txt2img", key, json=fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["job_id"])

    def ended(self, job_id: str, key: str) -> dict[str, Any]:
        """The job, once it has ended."""
        answer = self.ask("GET", f"/queue/{job_id}", key, params={"wait": "60"})
        assert answer.json()["state"] in ("done", "error"), answer.text
        return dict(answer.json())


def home_with_keys(home: Path) -> dict[str, str]:
    """An installation of one small model with two users and an admin."""
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    keyring = Keyring(home / "access")
    return {name: keyring.add(name, Role.ADMIN if name == "boss" else Role.USER) for name in ("ann", "bob", "boss")}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A service on loopback with keys."""
    home = tmp_path_factory.mktemp("keyed")
    keys = home_with_keys(home)
    with serving(home, secret_key="s" * 64) as server:
        yield Keyed(server, keys)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every path that the app has a route for, as declared."""
    app = build_app(Settings(home=tmp_path_factory.mktemp("routes"), engine="stub"), worker=False)

    def under(routes: list[BaseRoute], before: str = "") -> Iterator[str]:
        for route in routes:
            if isinstance(route, Mount):
                yield f"{before}{route.path}/x"
                yield from under(route.routes, before + route.path)
            elif included := getattr(route, "original_router", None):  # as FastAPI keeps those of `include_router`
                yield from under(included.routes, before + route.include_context.prefix)  # type: ignore[attr-defined]
            else:
                yield before + str(getattr(route, "path"))  # noqa: B009 - the base class has none

    found = sorted({*under(app.routes), *app.openapi()["paths"]})
    assert {"/txt2img", "/queue/{job_id}", "/metrics", "/models", "/compat/diffusionapi/txt2img"} <= set(found)
    return found


def filled(path: str, value: str) -> str:
    return re.sub(r"\{[^}]+\}", value, path)


def test_no_route_answers_without_a_key_but_the_named_ones(keyed: Keyed, paths: list[str]) -> None:
    wrong = {"X-API-Key": "dapi_00000000_" + "A" * 43}
    for path in [*paths, "/nope", "/queue/", "/hello/", "/HELLO", "/docs/../queue/pause", "/%2e/models"]:
        url = filled(path, NOBODYS)
        for method in METHODS:
            answer = keyed.ask(method, url)
            where = (method, url, answer.status_code, answer.text[:200])
            shared = re.sub(r"^/compat/\w+(?=/.)", "", path)
            if method in ("GET", "HEAD") and (shared in OPEN or path.startswith("/static-offline-docs/")):
                assert answer.status_code not in (401, 403), where
                continue
            if re.fullmatch(r"/(token|user)(/.+)?", shared) and method in ("GET", "HEAD", "POST"):
                assert answer.status_code in (403, 405, 422, 415), where  # their own switches and passwords
                continue
            assert answer.status_code == 401, where
            if asks_for_token(method, url):
                assert answer.headers["WWW-Authenticate"] == "Bearer", where
                assert method == "HEAD" or answer.json() == {"detail": "Could not validate credentials"}, where
                continue
            assert answer.headers["WWW-Authenticate"] == "ApiKey", where
            if method != "HEAD":
                assert answer.json()["detail"].startswith("Missing"), where
    assert keyed.ask("GET", "/models", headers=wrong).status_code == 403


def test_each_caller_lists_their_own_jobs_and_the_admin_all(keyed: Keyed) -> None:
    owners = {keyed.submit(name, prompt=f"by {name}", model="small", steps=1): name for name in ("ann", "bob")}
    for name in ("ann", "bob", "boss"):
        listed = {row["job_id"] for row in keyed.ask("GET", "/queue", name, params={"limit": 200}).json()["jobs"]}
        assert {owner for job_id, owner in owners.items() if job_id in listed} == (
            {"ann", "bob"} if name == "boss" else {name}
        )


def test_no_caller_meets_the_job_of_another(keyed: Keyed, paths: list[str]) -> None:
    waiting = keyed.submit("ann", prompt="stub:seconds=0.5", steps=150, model="small")
    done = keyed.submit("ann", prompt="a lighthouse", model="small", steps=1, priority=9)
    eventually(lambda: keyed.ask("GET", f"/queue/{waiting}", "ann").json()["state"] == "processing", "the first job")
    of_jobs = [path for path in paths if "{" in path]
    assert "/queue/{job_id}" in of_jobs
    for job_id in (waiting, done):
        for path in of_jobs:
            for method in METHODS:
                for query in ("", "?wait=60", "?partial=true"):
                    began = time.monotonic()
                    theirs = keyed.ask(method, filled(path, job_id) + query, "bob")
                    nobodys = keyed.ask(method, filled(path, NOBODYS) + query, "bob")
                    assert theirs.status_code == nobodys.status_code, (method, path, query)
                    assert theirs.text.replace(job_id, NOBODYS) == nobodys.text, (method, path, query)
                    assert time.monotonic() - began < 30, "it waited for another's job"
    for path in paths:
        if "{" not in path:
            shown = keyed.ask("GET", path, "bob").text
            assert waiting not in shown, path
            assert done not in shown, path
    assert waiting in keyed.ask("GET", "/queue", "ann").text
    assert keyed.ask("GET", f"/queue/{waiting}", "ann").json()["state"] == "processing"
    assert keyed.ask("DELETE", f"/queue/{waiting}", "ann").json()["cancelled"] is True
    assert keyed.ended(done, "ann")["image"]
    assert keyed.ask("GET", f"/queue/{done}", "bob").status_code == 404
    assert keyed.ask("GET", f"/queue/{done}", "boss").json()["image"]


def test_an_admin_cancels_the_job_of_anybody(keyed: Keyed) -> None:
    job_id = keyed.submit("bob", prompt="stub:seconds=0.5", steps=150, model="small")
    assert keyed.ask("DELETE", f"/queue/{job_id}", "boss").json()["cancelled"] is True


def test_the_same_idempotency_key_of_two_callers_makes_two_jobs(keyed: Keyed) -> None:
    fields = {"json": {"prompt": "a", "model": "small", "steps": 1}, "headers": {"Idempotency-Key": "same"}}
    ids = [keyed.ask("POST", "/txt2img", name, **fields).json()["job_id"] for name in ("ann", "bob", "ann")]
    assert ids[0] == ids[2] != ids[1]


def test_only_an_admin_does_what_is_done_to_all(keyed: Keyed) -> None:
    for path in ("/queue/pause", "/queue/resume", "/models/small/load"):
        refused = keyed.ask("POST", path)
        assert (refused.status_code, refused.json()["detail"]) == (
            401,
            "Missing admin API key. Provide X-API-Key header.",
        )
        refused = keyed.ask("POST", path, "ann")
        assert (refused.status_code, refused.json()["detail"]) == (
            403,
            "Invalid admin API key. Admin access required.",
        )
        assert keyed.ask("POST", path, "boss").status_code not in (401, 403, 501)
    assert keyed.ask("GET", "/ready").json()["ready"] is True


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def test_a_key_may_be_sent_in_each_of_the_ways(keyed: Keyed) -> None:
    key = keyed.keys["ann"]
    for headers in (
        {"X-API-Key": key},
        {"Authorization": f"Bearer {key}"},
        {"Authorization": f"bearer  {key}"},
        basic("anybody", key),
        basic(key, ""),
    ):
        assert keyed.ask("GET", "/models", headers=headers).status_code == 200, headers


@pytest.mark.parametrize(
    ("headers", "status", "detail"),
    [
        ({}, 401, MISSING),
        ({"X-API-Key": ""}, 401, MISSING),
        ({"X-API-Key": "x"}, 403, "Invalid API key"),
        ({"X-API-Key": "é".encode()}, 403, "Invalid API key"),
        ({"Authorization": "Bearer x"}, 401, "Could not validate credentials"),
        ({"Authorization": "Bearer a.b.c"}, 401, "Could not validate credentials"),
        ({"Authorization": "Bearer"}, 401, "Could not validate credentials"),
        ({"Authorization": "Digest x"}, 401, MISSING),
        ({"Authorization": "Basic ???"}, 403, "Invalid API key"),
        (basic("ann", "wrong"), 403, "Invalid API key"),
    ],
    ids=str,
)
def test_a_refusal_says_what_is_wrong_in_the_words_of_the_documents(
    keyed: Keyed, headers: dict[str, Any], status: int, detail: str
) -> None:
    answer = keyed.ask("GET", "/models", headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (status, detail)
    assert ("WWW-Authenticate" in answer.headers) is (status == 401)


def test_a_key_in_the_address_is_none(keyed: Keyed) -> None:
    for path in ("/models", "/txt2img", "/queue/x"):
        for name in ("token", "api_key", "key", "X-API-Key"):
            assert keyed.ask("GET", path, params={name: keyed.keys["boss"]}).status_code == 401


def test_nobody_learns_more_of_the_box_than_that_it_is_up(keyed: Keyed) -> None:
    assert keyed.ask("GET", "/hello").json() == {"ok": True}
    assert keyed.ask("GET", "/ready").json()["ready"] is True
    assert keyed.ask("GET", "/health").json().keys() == {"status", "timestamp"}
    assert keyed.ask("GET", "/health", "ann").json().keys() > {"system", "gpu", "queue", "disk"}


def test_a_key_is_in_no_log_and_no_record(keyed: Keyed) -> None:
    keyed.ended(keyed.submit("ann", prompt="a", model="small", steps=1), "ann")
    kept = [path for path in keyed.server.home.rglob("*") if path.is_file() and path.suffix in (".json", ".log")]
    assert any(path.parent.name == "done" for path in kept)
    for key in keyed.keys.values():
        assert [path for path in kept if key in path.read_text()] == []


def test_a_key_made_or_taken_away_counts_at_once(keyed: Keyed) -> None:
    keyring = Keyring(keyed.server.home / "access")
    text = keyring.add("guest", Role.USER)
    assert keyed.ask("GET", "/models", headers={"X-API-Key": text}).status_code == 200
    keyring.revoke("guest")
    assert keyed.ask("GET", "/models", headers={"X-API-Key": text}).status_code == 403


# tokens


def access(keyed: Keyed, secret: str = "s" * 64) -> Access:
    return access_of(Settings(home=keyed.server.home, secret_key=secret))


def access_of(settings: Settings) -> Access:
    return Access(settings, Keyring(settings.access_dir), Users(settings.access_dir))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_token_stands_for_its_caller_until_it_ends_and_no_longer_than_the_key(keyed: Keyed) -> None:
    keyring = Keyring(keyed.server.home / "access")
    guest = keyring.verify(keyring.add("guest", Role.USER))
    assert guest is not None
    token = access(keyed).token(guest)
    assert token != access(keyed).token(guest), "two tokens of one second are two"
    job_id = keyed.ask("POST", "/txt2img", json={"model": "small", "steps": 1}, headers=bearer(token)).json()["job_id"]
    assert keyed.ask("GET", f"/queue/{job_id}", headers=bearer(token)).status_code == 200
    assert keyed.ask("GET", f"/queue/{job_id}", "ann").status_code == 404
    late = access(keyed).token(guest, seconds=-1)
    other = access(keyed, "t" * 64).token(guest)
    for wrong in (late, other, token[:-4] + "AAAA", token.rsplit(".", 1)[0] + "."):
        assert keyed.ask("GET", "/models", headers=bearer(wrong)).status_code == 401
    keyring.revoke("guest")
    assert keyed.ask("GET", "/models", headers=bearer(token)).status_code == 401


def test_a_token_of_somebody_without_a_key_is_no_more_than_it_says(keyed: Keyed) -> None:
    token = access(keyed).token(Users(keyed.server.home / "access").add("eve", "pw"))
    assert keyed.ask("GET", "/models", headers=bearer(token)).status_code == 200
    assert keyed.ask("POST", "/queue/pause", headers=bearer(token)).status_code == 403


def test_a_token_may_stand_in_an_address_where_links_are_made_for_people(keyed: Keyed) -> None:
    token = access(keyed).token(Users(keyed.server.home / "access").add("ida", "pw"))
    assert keyed.ask("GET", "/txt2img", params={"token": token}).status_code not in (401, 403)
    assert keyed.ask("GET", "/txt2img", params={"token": token}, headers={"X-API-Key": "x"}).status_code == 403
    assert keyed.ask("GET", "/models", params={"token": token}).status_code == 401
    assert token not in keyed.server.log


def test_what_tokens_are_signed_with_is_made_and_kept_for_this_user_only(tmp_path: Path) -> None:
    caller = Caller(id="user:eve", role=Role.USER)
    tokens = [access_of(Settings(home=tmp_path)).token(caller) for _ in range(2)]
    secret = tmp_path / "access" / "secret"
    assert len(secret.read_text()) == 64
    assert secret.stat().st_mode & 0o777 == 0o600
    import jwt

    assert [jwt.decode(token, secret.read_text(), algorithms=["HS256"])["sub"] for token in tokens] == ["user:eve"] * 2


# addresses


def test_loopback_without_keys_is_open_until_there_is_one(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.said == ""
        assert server.get("/models").status_code == 200
        assert server.get("/models", headers={"X-API-Key": "of another service"}).status_code == 200
        assert server.request("POST", "/queue/pause").status_code == 200
        key = Keyring(tmp_path / "access").add("ann", Role.USER)
        assert server.get("/models").status_code == 401
        assert server.get("/models", headers={"X-API-Key": key}).status_code == 200
        refused = server.request("POST", "/queue/resume", headers={"X-API-Key": key})
        assert (refused.status_code, refused.json()["detail"]) == (501, "Admin API key not configured on server")
    assert not (tmp_path / "access" / "secret").exists()


def test_on_any_other_address_a_key_is_made_at_the_first_start_and_shown_once(tmp_path: Path) -> None:
    import shlex
    import subprocess

    with serving(tmp_path, host="0.0.0.0") as server:
        key, curl = (line.strip() for line in server.said.splitlines()[1:3])
        assert server.get("/models").status_code == 401
        assert server.get("/queue/x", headers={"X-API-Key": key}).status_code == 404
        assert server.request("POST", "/queue/pause", headers={"X-API-Key": key}).status_code == 200
        words = shlex.split(curl)
        assert key in words[3]
        done = subprocess.run(
            [*words, "-w", "%{http_code}", "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
        assert done.stdout == "200"
        assert key not in server.log
    assert key not in (tmp_path / "access" / "keys.json").read_text()
    with serving(tmp_path, host="0.0.0.0") as server:
        assert server.said == ""
        assert server.get("/models").status_code == 401
        assert server.get("/models", headers={"X-API-Key": key}).status_code == 200


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_an_operator_may_let_everybody_in(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "variable":
        monkeypatch.setenv("REQUIRE_AUTH", "false")
    arguments = ("--allow-anonymous",) if way == "flag" else ()
    with serving(tmp_path, *arguments, host="0.0.0.0") as server:
        assert server.said == ""
        assert server.get("/models").status_code == 200
        assert server.get("/task/x").status_code == 404, "no token is asked for either"
        assert server.request("POST", "/queue/pause").status_code == 200
        key = Keyring(tmp_path / "access").add("boss", Role.ADMIN)
        assert server.get("/models").status_code == 200
        assert server.get("/task/x").status_code == 404
        assert server.request("POST", "/queue/pause").status_code == 403
        assert server.request("POST", "/queue/pause", headers={"X-API-Key": key}).status_code == 200


def test_keys_of_the_settings_open_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", " one, two ,,")
    monkeypatch.setenv("ADMIN_API_KEY", "boss")
    from serving import environment

    assert "API_KEY" not in environment(), "tests do not meet the keys of the person who runs them"
    with serving(tmp_path, host="0.0.0.0", api_key=" one, two ,,", admin_api_key="boss") as server:
        assert server.said == ""
        for key in ("one", "two", "boss"):
            assert server.get("/models", headers={"X-API-Key": key}).status_code == 200
        for key in ("on", "one,", "three", ","):
            assert server.get("/models", headers={"X-API-Key": key}).status_code == 403
        assert server.request("POST", "/queue/pause", headers={"X-API-Key": "one"}).status_code == 403
        assert server.request("POST", "/queue/pause", headers={"X-API-Key": "boss"}).status_code == 200


def test_an_app_that_does_not_know_its_address_is_open_on_loopback_alone(tmp_path: Path) -> None:
    app = build_app(Settings(home=tmp_path, engine="stub"), worker=False)

    async def ask(server: tuple[str, int | None] | None) -> int:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

        async def receive() -> Any:
            return {"type": "http.request"}

        scope = {"type": "http", "method": "GET", "path": "/models", "raw_path": b"/models", "query_string": b""}
        scope |= {"headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": server}
        await app({**scope, "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send)
        return statuses[0]

    import asyncio

    for server, status in (
        (("127.0.0.1", 8000), 200),
        (("::1", 8000), 200),
        (("/run/api.sock", None), 200),
        (None, 200),
        (("192.168.1.5", 8000), 401),
        (("172.17.0.2", 8000), 401),
        (("fd00::5", 8000), 401),
    ):
        assert asyncio.run(ask(server)) == status, server


def test_a_service_whose_keys_cannot_be_read_is_up_and_lets_nobody_in(tmp_path: Path) -> None:
    keys = home_with_keys(tmp_path)
    with serving(tmp_path) as server:
        (tmp_path / "access" / "keys.json").write_text("{")
        answer = server.get("/models", headers={"X-API-Key": keys["ann"]})
        assert answer.status_code == 503
        assert "access/keys.json cannot be read" in answer.json()["detail"]
        assert str(tmp_path) not in answer.text
        assert server.get("/hello").status_code == 200


def test_who_guesses_is_told_to_wait_and_others_are_not(tmp_path: Path) -> None:
    keys = home_with_keys(tmp_path)
    with serving(tmp_path) as server:
        assert server.get("/models", headers={"X-API-Key": keys["ann"]}).status_code == 200
        guesses = [server.get("/models", headers={"X-API-Key": f"guess {n}"}) for n in range(35)]
        assert [answer.status_code for answer in guesses] == [403] * 30 + [429] * 5
        assert 1 <= int(guesses[-1].headers["Retry-After"]) <= 60
        assert server.get("/models", headers={"X-API-Key": keys["ann"]}).status_code == 200
        other = {"X-Forwarded-For": "192.0.2.7", "X-API-Key": keys["bob"]}
        assert server.get("/models", headers=other).status_code == 200
