"""Behind a real nginx, under a sub-path, and over https: the docs, the addresses of callers, the limits."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fake_models import diffusers_folder
from serving import Program, eventually, run, serving
from websockets.sync.client import connect

from diffusion_api.client import Client
from diffusion_api.connections import is_proxy

NGINX = shutil.which("nginx")

CONFIG = """
daemon off; user root; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off; client_max_body_size 64m;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port};
    location /sd/ {{
      proxy_pass {upstream};
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto $scheme;
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_read_timeout 90s;
    }}
  }}
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def nginx(folder: Path, port: int, upstream: str) -> Iterator[None]:
    """nginx that serves ``/sd/`` of this port from there, ended by its own process id."""
    assert NGINX
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, port=port, upstream=upstream))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [NGINX, "-c", config, "-p", folder, "-e", folder / "error.log"], stderr=log, stdout=log
        )
    try:
        eventually(lambda: process.poll() is not None or not socket.socket().connect_ex(("127.0.0.1", port)), "nginx")
        assert process.poll() is None, (folder / "log").read_text()
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx-light")
@pytest.mark.parametrize("stripped", [True, False], ids=["prefix taken off", "prefix left on"])
def test_it_works_behind_nginx_under_a_sub_path(tmp_path: Path, stripped: bool) -> None:
    home, port = tmp_path / "home", free_port()
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    public = f"http://127.0.0.1:{port}/sd"
    with serving(home, public_url=f"{public}/", api_key="ann") as server:
        assert server.url == public
        direct = re.search(r"it listens on (http://\S+)", server.log)
        assert direct
        with (
            nginx(tmp_path / "nginx", port, direct[1] + "/" * stripped),
            httpx.Client(trust_env=False, headers={"X-API-Key": "ann"}) as http,
            Client(public, key="ann") as client,
        ):
            # The library, with a wait in it
            job = client.txt2img(prompt="a lighthouse", model="small", steps=1)
            assert client.wait(job.job_id)["state"] == "done"
            # The link to its picture, by who has no key
            link = http.get(f"{public}/queue/{job.job_id}").json()["image_url"]
            assert link.startswith(f"{public}/image/")
            assert httpx.get(link, trust_env=False).headers["content-type"] == "image/jpeg"
            # A dialect where it is alone
            assert http.get(f"{public}/compat/diffusionapi/queue/{job.job_id}").json()["state"] == "done"
            # Events of the task API, and the URLs in them
            events = connect(
                f"ws://127.0.0.1:{port}/sd/compat/tasks/events?format=json",
                additional_headers={"X-API-Key": "ann"}, proxy=None,
            )  # fmt: skip
            with events as socket:
                http.post(f"{public}/task", json={"prompt": "a", "model": "small", "steps": 1})
                told = [json.loads(socket.recv(timeout=60)) for _ in range(3)]
            assert told[-1]["result"]["blob_url"].startswith(f"{public}/blob/")
            assert httpx.get(told[-1]["result"]["blob_url"], trust_env=False).headers["content-type"] == "image/png"
            # The documentation finds its files and the API
            docs = http.get(f"{public}/", follow_redirects=True)
            assert str(docs.url) == f"{public}/docs"
            files = re.findall(r'(?:src|href)="([^"]+)"', docs.text)
            assert files
            for file in [*files, "/sd/openapi.json"]:
                assert file.startswith("/sd/"), file
                assert http.get(f"http://127.0.0.1:{port}{file}").status_code == 200
            assert "/sd/openapi.json" in docs.text
            assert http.get(f"{public}/openapi.json").json()["servers"] == [{"url": "/sd"}]
            # What needs a key still does, and its pages may post
            assert httpx.get(f"{public}/models", trust_env=False).status_code == 401
            assert httpx.get(f"{public}/hello", trust_env=False).status_code == 200
            for origin, status in ((f"http://127.0.0.1:{port}", 200), ("https://evil.example", 403)):
                body = {"model": "small", "steps": 1}
                assert http.post(f"{public}/txt2img", json=body, headers={"Origin": origin}).status_code == status
            big = http.post(f"{public}/txt2img", json={"model": "small", "steps": 1, "x": "y" * 10**7})
            assert big.status_code == 200
            # The proxy says who calls, and its word is the last
            other = httpx.HTTPTransport(local_address="127.0.0.2")
            with httpx.Client(transport=other, headers={"X-Forwarded-For": "192.0.2.7"}) as elsewhere:
                assert elsewhere.get(f"{public}/models").status_code == 401
        eventually(lambda: re.search(r"127\.0\.0\.2 GET \S*/models 401", server.log), "the line of the refusal")
        assert "192.0.2.7" not in server.log


def test_only_trusted_proxies_say_who_calls(tmp_path: Path) -> None:
    said = {"X-Forwarded-For": "192.0.2.7", "X-API-Key": "x"}
    for trusted, address in (("127.0.0.0/8", "192.0.2.7"), ("192.0.2.1", "127.0.0.1")):
        with serving(tmp_path / address / trusted.replace("/", "-"), trusted_proxies=trusted) as server:
            assert server.get("/models", headers=said).status_code == 200
            eventually(lambda: f"{address} GET /models 200" in server.log, "the line of the request")  # noqa: B023
            assert ("a proxy lets 192.0.2.7 call" in server.log) is (address == "192.0.2.7")


@pytest.mark.parametrize(
    ("host", "trusted", "is_one"),
    [
        ("127.0.0.1", "127.0.0.1,::1", True),
        ("::1", "127.0.0.1, ::1", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "*", True),
        ("10.1.2.3", "", False),
        ("10.1.2.3", "10.1.2.4,nonsense,11.0.0.0/8", False),
        ("", "127.0.0.1", False),
    ],
)
def test_proxies_are_addresses_and_networks(host: str, trusted: str, is_one: bool) -> None:
    assert is_proxy(host, trusted) is is_one


# https


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a certificate that the command made."""
    home = tmp_path_factory.mktemp("https")
    made = run("certificate", "box.example", "192.0.2.1", "--home", home, cwd=home)
    assert made.returncode == 0, made.stderr
    assert f"--ssl-keyfile {home}/access/key.pem --ssl-certfile {home}/access/cert.pem" in made.stdout
    again = run("certificate", "--home", home, cwd=home)
    assert (again.returncode, again.stderr[-32:]) == (1, "key.pem cannot be written: File exists\n"[-32:])
    return home


def test_a_certificate_is_for_its_names_and_its_key_for_this_user_only(pair: Path) -> None:
    key, cert = pair / "access" / "key.pem", pair / "access" / "cert.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    found = ssl._ssl._test_decode_cert(cert)  # type: ignore[attr-defined]
    names = {name for _, name in found["subjectAltName"]}
    assert names >= {"localhost", "127.0.0.1", "box.example", "192.0.2.1"}


def test_https_is_served_with_that_pair(pair: Path) -> None:
    key, cert = pair / "access" / "key.pem", pair / "access" / "cert.pem"
    with serving(pair, "--ssl-keyfile", key, "--ssl-certfile", cert) as server:
        assert server.url.startswith("https://127.0.0.1:")
        for name in ("localhost", "127.0.0.1"):
            port = server.url.rpartition(":")[2]
            with httpx.Client(verify=ssl.create_default_context(cafile=cert), trust_env=False) as http:
                assert http.get(f"https://{name}:{port}/hello").json() == {"ok": True}
        with pytest.raises(httpx.ConnectError, match=r"self-signed|certificate verify failed"):
            httpx.get(f"{server.url}/hello", trust_env=False)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url.replace('https', 'http')}/hello", trust_env=False)


def test_a_pair_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.pem").write_text("x")
    for file in ("nowhere.pem", "broken.pem"):
        path = tmp_path / file
        done = run("serve", "--port", 0, "--ssl-keyfile", path, "--ssl-certfile", path, cwd=tmp_path, engine="stub")
        assert done.returncode == 1
        assert "https cannot be served with the certificate" in done.stderr
        assert "`diffusion-api certificate` makes a pair" in done.stderr.splitlines()[-1]


def test_the_places_of_one_address_have_a_limit_but_a_proxys_do_not(tmp_path: Path) -> None:
    def open_at_once(server: Program, number: int) -> list[int]:
        host, port = server.url.removeprefix("http://").split(":")
        sockets = [socket.create_connection((host, int(port))) for _ in range(number)]
        try:
            for each in sockets:
                each.sendall(b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return sorted(int(each.recv(4096).split()[1]) for each in sockets)
        finally:
            for each in sockets:
                each.close()

    with serving(tmp_path / "a", max_connections_per_client=3, trusted_proxies="192.0.2.1") as server:
        assert open_at_once(server, 5) == [200] * 3 + [429] * 2
        assert eventually(lambda: open_at_once(server, 3) == [200] * 3, "places to become free")
    with serving(tmp_path / "b", max_connections_per_client=3) as server:
        assert open_at_once(server, 5) == [200] * 5
