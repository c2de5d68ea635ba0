"""Links to pictures, as a browser without a key follows them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_models import diffusers_folder
from serving import Program, serving

from diffusion_api.errors import Gone, Misconfigured, NotFound
from diffusion_api.links import HOUR, LASTS, Links

KEY = "the-key-of-an-admin"
JOB = "242d6f93-ea2d-4d5e-b820-0b61468558be"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service that asks for a key."""
    home = tmp_path_factory.mktemp("links")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(home, admin_api_key=KEY) as program:
        program.key = KEY
        yield program


def without_key(server: Program, path: str, **headers: str) -> httpx.Response:
    return httpx.get(server.url + path, headers=headers, timeout=120, trust_env=False)


def test_a_link_shows_its_picture_and_no_other_to_who_has_no_key(server: Program) -> None:
    status = server.result(prompt="x", model="small", steps=1, n=2)
    assert status["image_url"] == status["image_urls"][0]
    for number, link in enumerate(status["image_urls"]):
        assert without_key(server, f"/queue/{status['job_id']}/image/{number}").status_code == 401
        answer = without_key(server, link, **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"})
        assert answer.status_code == 200
        assert answer.content == (server.home / status["output_paths"][number]).read_bytes()
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
        assert without_key(server, link, **{"If-None-Match": answer.headers["etag"]}).status_code == 304
    first, second = status["image_urls"]
    assert without_key(server, first.replace(".0.", ".1.")).status_code == 404
    assert without_key(server, re.sub(r"\.\d{10}\.", f".{int(time.time()) + 2 * LASTS}.", first)).status_code == 404
    assert without_key(server, second[:-1]).status_code == 404


def test_a_link_is_no_key(server: Program) -> None:
    link = server.result(prompt="x", model="small", steps=1)["image_url"].removeprefix("/image/")
    for headers in ({"Authorization": f"Bearer {link}"}, {"X-API-Key": link}):
        assert without_key(server, "/models", **headers).status_code in (401, 403)


def test_a_link_opens_for_a_day_and_is_the_same_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links(lambda: "s" * 64)
    begin = 1_795_251_600 // HOUR * HOUR
    monkeypatch.setattr(time, "time", lambda: begin + 1.0)
    link = links.link(JOB, 3) or ""
    text = link.removeprefix("/image/")
    monkeypatch.setattr(time, "time", lambda: begin + HOUR - 1.0)
    assert links.link(JOB, 3) == link
    monkeypatch.setattr(time, "time", lambda: begin + HOUR - 1.0 + LASTS)
    assert links.opened(text) == (JOB, 3)
    assert links.link(JOB, 3) != link
    monkeypatch.setattr(time, "time", lambda: begin + HOUR + 0.0 + LASTS)
    with pytest.raises(Gone, match="expired"):
        links.opened(text)


def test_a_link_of_another_secret_opens_nothing() -> None:
    text = (Links(lambda: "a" * 64).link(JOB, 0) or "").removeprefix("/image/")
    for other in (text, text.upper(), "", "x", f"{JOB}.0.99999999999.{'0' * 64}", f"{JOB}.٣.1.{'0' * 64}"):
        with pytest.raises(NotFound):
            Links(lambda: "b" * 64).opened(other)


def test_without_a_secret_there_are_no_links() -> None:
    def none() -> str:
        raise Misconfigured("the folder cannot be written")

    assert Links(none).link(JOB, 0) is None


def test_the_secret_outlives_the_service(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(tmp_path) as server:
        link = server.result(prompt="x", model="small", steps=1)["image_url"]
    with serving(tmp_path) as server:
        assert server.get(link).status_code == 200
