"""What every request passes and every answer carries: names, origins, sizes, headers; nothing of the host in any."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import raw
from fake_models import diffusers_folder
from serving import Program, eventually, serving

from diffusion_api import door
from diffusion_api.access import Access
from diffusion_api.keys import Keyring
from diffusion_api.metrics import Metrics
from diffusion_api.schema.caller import Role
from diffusion_api.settings import Settings
from diffusion_api.users import Users

MIB = 2**20
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A fresh installation's limits, one model, and a web page of another site that may post."""
    home = tmp_path_factory.mktemp("door")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    diffusers_folder(home / "outside", sample_size=8)
    with serving(home, allowed_origins="https://ui.example.org") as program:
        yield program


def refusal(answer: httpx.Response, status: int) -> str:
    """Why a request was refused, in the shape that all refusals have."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"status", "detail", "error"}
    assert body["detail"] == body["error"]
    return str(body["error"])


def jobs(server: Program) -> int:
    """How many jobs were ever taken."""
    eventually(lambda: server.get("/health").json()["queue"]["active_jobs"] == 0, "all jobs to end")
    return sum(1 for state in ("done", "error", "cancelled") for _ in (server.home / "queue" / state).glob("*.json"))


# answers


def everything(server: Program) -> Iterator[httpx.Response]:
    """An answer of every kind: each route with what it does not expect, and what never reaches one."""
    paths = server.get("/openapi.json").json()["paths"]
    for path in [*paths, "/", "/docs", "/redoc", "/openapi.json", "/metrics", "/nope", "/static-offline-docs/nope.js"]:
        for place in ("x", "..%2f..%2fetc%2fpasswd", "%00", "a" * 300):
            url = re.sub(r"\{\w+\}", place, path)
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
                yield server.request(method, url)
            yield server.request("POST", url, content=b"{", headers=JSON)
            yield server.request("POST", url, json={"model": str(server.home), "prompt": "x"})
            if "{" not in path:
                break
    yield server.request("POST", "/txt2img", content=b"[" * 10**5, headers=JSON)
    yield server.get("/hello", headers={"Host": "evil.example"})
    yield server.request("POST", "/txt2img", headers={"Origin": "https://evil.example"})
    yield server.get("/hello", headers={f"X-{n}": "1" for n in range(200)})
    yield server.request("POST", "/txt2img", content=b"x", headers={"Content-Encoding": "gzip"})
    yield broken(server)


def broken(server: Program) -> httpx.Response:
    """An answer to what nobody foresaw: a folder where a picture should be."""
    status = server.result(model="small", steps=1)
    path = server.home / status["output_path"]
    path.unlink()
    path.mkdir()
    return server.get(f"/queue/{status['job_id']}")


def test_no_answer_tells_of_the_host_or_the_program(server: Program) -> None:
    telling = [str(server.home), "Traceback", 'File "', "site-packages", "diffusion_api/", "/tmp", "uvicorn"]
    statuses = set()
    for answer in everything(server):
        statuses.add(answer.status_code)
        said = answer.text + repr(answer.headers)
        if str(server.home).encode() in answer.request.content:
            said = said.replace(str(server.home), "")  # the caller's own words
        where = (answer.request.method, str(answer.url))
        assert [word for word in telling if word in said] == [], where
    assert statuses >= {200, 307, 400, 403, 404, 405, 415, 431, 500}


def test_every_answer_has_the_headers_that_bind_browsers_and_caches(server: Program) -> None:
    for answer in everything(server):
        where = (answer.request.method, str(answer.url))
        assert answer.headers["X-Content-Type-Options"] == "nosniff", where
        assert answer.headers["X-Frame-Options"] == "DENY", where
        assert answer.headers["Referrer-Policy"] == "no-referrer", where
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin", where
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"], where
        assert answer.headers["Cache-Control"] == "no-store", where
        assert answer.headers["X-Request-ID"], where
        assert "Server" not in answer.headers, where
        assert not [name for name in answer.headers if name.lower().startswith("access-control")], where


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_pages_of_the_documentation_load_what_their_policy_allows_and_nothing_else(
    server: Program, page: str
) -> None:
    answer = server.get(page)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert "'self'" in policy["script-src"]
    assert "https:" not in answer.headers["Content-Security-Policy"]
    files = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert files
    assert [file for file in files if not file.startswith("/")] == []
    for file in files:
        assert server.get(file).status_code == 200


def test_files_of_the_documentation_may_be_kept_by_a_browser(server: Program) -> None:
    (script,) = re.findall(r'src="(/[^"]+\.js)"', server.get("/docs").text)[:1]
    answer = server.get(script)
    assert answer.headers["ETag"]
    assert "Cache-Control" not in answer.headers
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_what_nobody_foresaw_is_answered_with_its_id_alone(server: Program) -> None:
    answer = broken(server)
    assert refusal(answer, 500) == "the service failed; its log has the details"
    line = f"[request {answer.headers['X-Request-ID']}] GET {answer.url.path} failed"
    eventually(lambda: line in server.log, "the trace in the log")
    assert server.log.count("Exception in ASGI application") == 0


# who may ask


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "127.0.0.1@evil.example",
        "evil.example:8000",
        "::1",
        "[::2]",
        "2130706433",
        "localhost:80:80",
        "localhost.",
        "",
        "é".encode(),
    ],
    ids=str,
)
def test_a_name_that_is_not_the_services_is_refused(server: Program, host: str) -> None:
    assert "this service answers as" in refusal(server.get("/hello", headers={"Host": host}), 400)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:7860"])
def test_names_of_loopback_are_the_services(server: Program, host: str) -> None:
    assert server.get("/hello", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, "localhost 127.0.0.1 [::1]"),
        ({"host": "::1"}, "localhost 127.0.0.1 [::1]"),
        ({"host": "192.168.1.5"}, "localhost 127.0.0.1 [::1] 192.168.1.5"),
        ({"host": "fd00::5"}, "localhost 127.0.0.1 [::1] [fd00::5]"),
        ({"host": "Box.lan"}, "localhost 127.0.0.1 [::1] box.lan"),
        ({"host": "0.0.0.0"}, "*"),
        ({"host": "::"}, "*"),
        ({"host": "0.0.0.0", "allowed_hosts": "API.example.org, [fd00::5]"}, "api.example.org [fd00::5]"),
        ({"allowed_hosts": "*"}, "*"),
        ({"public_url": "https://Box.example.org:8443/sd"}, "localhost 127.0.0.1 [::1] box.example.org"),
        ({"public_url": "https://box.example.org", "allowed_hosts": "a"}, "a box.example.org"),
    ],
    ids=str,
)
def test_the_names_of_the_service_follow_from_the_settings(settings: dict[str, Any], allowed: str) -> None:
    assert door.allowed_hosts(Settings(**settings)) == set(allowed.split())


def test_a_service_on_every_address_answers_to_any_name(tmp_path: Path) -> None:
    with serving(tmp_path, host="0.0.0.0") as server:
        assert server.get("/hello", headers={"Host": "box.example"}).status_code == 200
        answer = server.request("POST", "/txt2img", json={}, headers={"Origin": "https://evil.example"})
        assert "ALLOWED_ORIGINS" in refusal(answer, 403)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1", "http://localhost:1", "https://ui.example.org.evil"]
)
@pytest.mark.parametrize("path", ["/txt2img", "/nope"])
def test_a_post_from_the_page_of_another_site_is_refused(server: Program, origin: str, path: str) -> None:
    before = jobs(server)
    answer = server.request("POST", path, json={"model": "small", "steps": 1}, headers={"Origin": origin})
    assert repr(origin) in refusal(answer, 403)
    assert jobs(server) == before


def test_pages_of_the_service_and_of_allowed_sites_may_post(server: Program) -> None:
    for origin in (server.url, "https://ui.example.org", "https://UI.example.org"):
        answer = server.request("POST", "/txt2img", json={"model": "small", "steps": 1}, headers={"Origin": origin})
        assert answer.status_code == 200


def test_no_other_site_may_read_an_answer(server: Program) -> None:
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert refusal(server.request("OPTIONS", "/txt2img", headers=preflight), 403)
    answer = server.get("/hello", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 200
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT"])
@pytest.mark.parametrize("path", ["/txt2img", "/queue/x", "/models", "/metrics", "/nope"])
def test_what_a_page_of_another_site_has_a_browser_ask_for_is_refused(server: Program, path: str, method: str) -> None:
    for site in ("cross-site", "same-site", "Cross-Site"):
        said = refusal(server.request(method, path, json={"model": "small"}, headers={"Sec-Fetch-Site": site}), 403)
        assert said.startswith("a page of another site may not do this here. The operator can set")
    for site in ("same-origin", "none"):
        assert server.request(method, path, headers={"Sec-Fetch-Site": site}).status_code != 403


def test_a_page_of_another_site_may_lead_to_what_anybody_may_see(server: Program) -> None:
    for path in ("/", "/docs", "/openapi.json", "/hello", "/ready"):
        assert server.get(path, headers={"Sec-Fetch-Site": "cross-site"}).status_code in (200, 307)
    assert server.request("POST", "/hello", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_who_is_no_browser_says_nothing_of_pages_and_passes(server: Program) -> None:
    assert server.post(model="small", steps=1).status_code == 200


def test_a_page_of_an_allowed_site_may_ask_and_read(server: Program) -> None:
    page = {"Origin": "https://ui.example.org", "Sec-Fetch-Site": "cross-site"}
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-api-key"}
    preflight = server.request("OPTIONS", "/txt2img", headers=page | wish)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://ui.example.org"
    assert "x-api-key" in preflight.headers["Access-Control-Allow-Headers"].lower()
    for answer in (
        server.request("POST", "/txt2img", json={"model": "small", "steps": 1}, headers=page),
        server.get("/queue/x", headers=page),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == "https://ui.example.org"
        assert "Access-Control-Allow-Credentials" not in answer.headers
    assert [answer.status_code, answer.json()["error"]] == [404, "Job x not found"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png", ""])
def test_a_body_of_another_type_is_told_so(server: Program, kind: str) -> None:
    answer = server.request("POST", "/txt2img", content=b'{"model": "small"}', headers={"Content-Type": kind})
    assert "application/json" in refusal(answer, 415)


async def knock(**said: str) -> list[str]:
    """What a WebSocket meets that says this, at a door with a key, allowed pages and one route behind it."""
    keyring = Keyring(Path("nowhere"), [(Role.USER, "ann")])
    settings = Settings(allowed_origins="https://ui.example.org")
    met: list[str] = []

    async def events(scope: Any, receive: Any, send: Any) -> None:
        met.append(scope["state"]["caller"].name)
        await send({"type": "websocket.accept"})

    app: Any = events
    for layer in reversed(
        door.middleware(settings, Metrics(dict, list), Access(settings, keyring, Users(Path("nowhere"))))
    ):
        app = layer.cls(app, *layer.args, **layer.kwargs)

    async def send(message: Any) -> None:
        met.append(message["type"])

    headers = [
        (name.replace("_", "-").encode(), value.encode()) for name, value in {"host": "localhost", **said}.items()
    ]
    scope = {"type": "websocket", "path": "/events", "raw_path": b"/events", "query_string": b"", "headers": headers}
    await app(scope | {"scheme": "ws", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}, None, send)
    return met


def test_a_websocket_passes_the_same_door() -> None:
    refused = ["websocket.close"]
    assert asyncio.run(knock(x_api_key="ann")) == ["listed user", "websocket.accept"]
    assert asyncio.run(knock(x_api_key="ann", origin="https://ui.example.org"))[-1] == "websocket.accept"
    assert asyncio.run(knock()) == refused
    assert asyncio.run(knock(x_api_key="bob")) == refused
    assert asyncio.run(knock(x_api_key="ann", host="evil.example")) == refused
    assert asyncio.run(knock(x_api_key="ann", origin="https://evil.example")) == refused
    assert asyncio.run(knock(x_api_key="ann", sec_fetch_site="cross-site")) == refused


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/queue/x", "GET, DELETE"), ("/queue/pause", "GET, POST, DELETE"), ("/txt2img", "GET, POST"), ("/hello", "GET")],
)
def test_a_refused_method_is_told_those_that_are_allowed(server: Program, path: str, methods: str) -> None:
    answer = server.request("PATCH", path)
    assert refusal(answer, 405) == f"PATCH is not allowed for {path}"
    assert answer.headers["Allow"] == methods


# names


@pytest.mark.parametrize(
    "name",
    [
        "../../outside",
        "small/../../../outside",
        "{home}/outside",
        "file://{home}/outside",
        "..\\..\\outside",
        "%2e%2e/%2e%2e/outside",
        "\\\\host\\outside",
        "C:\\outside",
        "small\0",
        ".",
        "..",
        "/",
        "CON",
        "x" * 4000,
        "https://example.org/outside",
        "runwayml/stable-diffusion-v1-5",
    ],
)
def test_a_model_is_a_name_of_the_catalogue_and_never_a_place(server: Program, name: str) -> None:
    answer = server.post(model=name.format(home=server.home), steps=1)
    assert "is not installed; one of small" in refusal(answer, 400)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "x:1><lora:y", "\0", "https://example.org/x"])
def test_a_lora_is_no_place_either(server: Program, name: str) -> None:
    answer = server.post(model="small", steps=1, loras=[name], prompt=f"a cat <lora:{name}:1>").json()
    assert f"LoRA {name!r} was skipped: it is not installed" in answer["warnings"]
    assert all(warning.startswith(("LoRA ", "prompt: ")) for warning in answer["warnings"])
    status = server.wait(answer["job_id"])
    assert status["output_path"] == f"outputs/{status['job_id']}.jpg"


# how much


def peak(server: Program) -> int:
    """Bytes that the process had at most since :func:`reset_peak`."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def reset_peak(server: Program) -> int:
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    return peak(server)


BODIES: dict[str, tuple[bytes, dict[str, str], int]] = {
    "a gzip bomb": (gzip.compress(bytes(200 * MIB)), JSON | {"Content-Encoding": "gzip"}, 415),
    "a gzip bomb that does not say so": (gzip.compress(bytes(200 * MIB)), JSON, 400),
    "10^6 form fields": (b"a=1&" * 10**6, {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "10^6 multipart fields": (
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 10**5,
        {"Content-Type": "multipart/form-data; boundary=x"},
        415,
    ),
    "100 k names": (json.dumps({f"k{i}": 1 for i in range(10**5)}).encode(), JSON, 413),
    "10^5 brackets": (b"[" * 10**5, JSON, 400),
    "10^5 objects": (b'{"a":' * 10**5, JSON, 400),
    "empty lists": (b"[" + b"[]," * 10**6 + b"1]", JSON, 413),
    "a huge integer": (b'{"seed": ' + b"9" * 10**6 + b"}", JSON, 400),
    "a huge exponent": (b'{"cfg_scale": 1e999999999}', JSON, 400),
    "NaN": (b'{"cfg_scale": NaN}', JSON, 400),
    "-Infinity": (b'{"cfg_scale": -Infinity}', JSON, 400),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', JSON, 400),
    "a lone surrogate for a name": (b'{"\\udfff": 1}', JSON, 400),
    "NULs": (bytes(10**6), JSON, 400),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize(("body", "headers", "status"), BODIES.values(), ids=BODIES)
def test_a_body_that_is_a_bomb_is_refused_in_little_memory(
    server: Program, body: bytes, headers: dict[str, str], status: int
) -> None:
    before = jobs(server)
    base = reset_peak(server)
    refusal(server.request("POST", "/txt2img", content=body, headers=headers), status)
    assert peak(server) - base < 50 * MIB
    assert jobs(server) == before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_body_beyond_the_limit_is_not_taken_in(stub_server: Program) -> None:
    base = reset_peak(stub_server)
    with raw.connected(stub_server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(raw.HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(200):
            connection.sendall(b"100000\r\n" + b"x" * MIB + b"\r\n")
    assert peak(stub_server) - base < 50 * MIB


@pytest.mark.parametrize("length", [2**20 + 1, 10**12, 10**19])
def test_a_body_that_says_it_is_beyond_the_limit_is_not_waited_for(stub_server: Program, length: int) -> None:
    with raw.connected(stub_server) as connection:
        connection.sendall(raw.HEAD + f"Connection: close\r\nContent-Length: {length}\r\n\r\n".encode())
        status, _, body = raw.answer(connection)
    assert (status, body["error"]) == (413, "the request body is larger than the 1048576 bytes that are allowed")


def test_a_body_with_two_lengths_is_refused_with_all_that_follows_it(server: Program) -> None:
    """A proxy that believes the other length takes what follows for a request of its own (RFC 9112, 6.1)."""
    hidden = b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with raw.connected(server) as connection:
        connection.sendall(raw.HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden)
        status, headers, body = raw.answer(connection)  # and nothing after it
    assert (status, headers["connection"]) == (400, "close")
    assert "Content-Length or Transfer-Encoding" in body["error"]


def test_too_many_headers_are_refused(server: Program) -> None:
    few = {f"X-{n}": "1" for n in range(90)}
    assert server.get("/hello", headers=few).status_code == 200
    assert "at most 100 and 16384 bytes" in refusal(
        server.get("/hello", headers=few | {f"Y-{n}": "1" for n in range(20)}), 431
    )


@pytest.mark.parametrize("size", [20_000, 200_000, 2_000_000])
def test_too_large_headers_are_refused(server: Program, size: int) -> None:
    for request in (
        b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Long: " + b"x" * size + b"\r\n\r\n",
        b"GET /hello?" + b"x" * size + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ):
        with raw.connected(server) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
            status, headers, body = raw.answer(connection)
        if status:  # one who goes on sending may find the connection reset before the answer
            assert (status, headers["content-type"], body["status"]) == (431, "application/json", "error")
            assert headers["x-content-type-options"] == "nosniff"
    assert server.get("/hello").status_code == 200


def test_a_job_of_too_much_work_is_refused_though_each_number_is_allowed(server: Program) -> None:
    fields = {"model": "small", "steps": 150, "width": 1024, "height": 1024, "n": 16}
    message = refusal(server.post(**fields), 400)
    assert message == (
        "width x height x steps x n is 1024x1024x150x16 = 2516.6 megapixel-steps; at most 1000 are allowed"
    )


def test_a_thousand_unknown_fields_are_no_work(server: Program) -> None:
    fields = {f"{n} {secrets.token_hex(2000)}": n for n in range(1000)}
    message = refusal(server.post(model="small", steps=1, **fields), 400)
    assert "1000 fields that are not known" in message
    assert len(message) < 1000
