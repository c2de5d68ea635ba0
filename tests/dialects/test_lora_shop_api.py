"""The LoRA shop of the configuration API by HTTP, and the LoRAs that it adds in pictures."""

from __future__ import annotations

import base64
import io
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_civitai import KEY, Civitai, civitai
from fake_models import LORA_KEYS, checkpoint, diffusers_folder
from numpy.typing import NDArray
from PIL import Image
from semantics import asked, seen
from serving import PATIENCE, Program, eventually, run, serving

from diffusion_api.settings import DATA

USER, ADMIN = "your-api-key", "the-admins-key"
BOSS = {"X-API-Key": ADMIN}
PROMPT = "a large yellow star on a purple background"
DRAWING = {"model": "shapes", "steps": 10, "cfg_scale": 5, "seed": 3, "fileType": "png", "width": 128, "height": 128}


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Civitai]:
    with civitai() as state:
        style = checkpoint(tmp_path_factory.mktemp("made") / "style.safetensors", LORA_KEYS | {"padding": [10_000]})
        state.publish(12345, "Pixel Art Style", style.read_bytes(), baseModel="SDXL 1.0", trainedWords=["pixel art"])
        state.publish(12346, "Slow One", style.read_bytes()[:-4] + b"slow")
        state.publish(12347, "Broken", b"PK\3\4")
        state.publish(12348, "Of another base", style.read_bytes(), baseModel="Pony")
        yield state


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, market: Civitai) -> Iterator[Program]:
    """A service with the stub engine whose callers need keys."""
    home = tmp_path_factory.mktemp("shop")
    diffusers_folder(
        home / "stable_diffusion" / "models" / "stable-diffusion-xl-base-1.0", pipeline="StableDiffusionXLPipeline"
    )
    hosts = {"civitai_url": market.url, "pull_hosts": market.large.cdn, "civit_key": KEY}
    with serving(home, api_key=USER, admin_api_key=ADMIN, **hosts) as program:
        program.key = USER
        yield program


def add(server: Program, name: object, method: str = "POST", **headers: str) -> httpx.Response:
    """The answer to ``/add_new_lora`` for an admin."""
    return server.request(method, "/add_new_lora", params={"name": str(name)}, headers=BOSS | headers)


def loras_dir(server: Program) -> set[str]:
    return {path.name for path in (server.home / "stable_diffusion" / "loras").glob("*.safetensors")}


def test_the_example_of_the_original_works_as_printed(server: Program) -> None:
    before = server.get("/get_available_loras").json()
    added = httpx.get(f"{server.url}/add_new_lora?name=pixel_art_style", headers={"X-API-Key": ADMIN}, timeout=PATIENCE)
    assert added.json().splitlines() == [
        "searchterm pixel_art_style lead to 1 models",
        "collecting the first one: Pixel Art Style",
        "here as pixel_art_style",
        "base model: stabilityai/stable-diffusion-xl-base-1.0; trigger words: pixel art; usage rights: Image, Sell",
    ]
    assert (added.status_code, added.headers["cache-control"]) == (200, "no-store")
    response = httpx.post(
        f"{server.url}/post_config",
        params={
            "prompt": "pixel_art_style, a cat wearing sunglasses",
            "lora": "pixel_art_style",
            "model_id": "stabilityai/stable-diffusion-xl-base-1.0",
        },
        headers={"X-API-Key": USER},
        timeout=PATIENCE,
    )
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert before == {}
    assert server.get("/get_available_loras").json() == {
        "pixel_art_style": {
            "model_id": 12345,
            "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
            "lora_path": f"{add_url(server)}/api/download/models/123450",
            "trigger words": ["pixel art"],
            "allow_no_mention": True,
            "usage_rights": "Image, Sell",
        }
    }


def add_url(server: Program) -> str:
    """Civitai's address as the service has it in its list."""
    listed = json.loads((server.home / "lora_list.json").read_text())
    return str(listed["pixel_art_style"]["lora_path"]).partition("/api/")[0]


@pytest.mark.parametrize("prefix", ["", "/compat/sd"])
def test_what_is_here_already_is_answered_with_nothing(server: Program, prefix: str) -> None:
    add(server, 12345)
    answer = server.request("POST", f"{prefix}/add_new_lora?name=12345", headers=BOSS)
    assert (answer.status_code, answer.json()) == (200, "")


def test_other_apis_and_the_command_show_what_the_maker_allows(server: Program, tmp_path: Path) -> None:
    add(server, 12345)
    rows = {row["name"]: row for row in server.get("/loras").json()["loras"]}
    row = rows["pixel_art_style"]
    assert (row["trigger_words"], row["usage_rights"], row["allow_no_mention"]) == (["pixel art"], "Image, Sell", True)
    told = run("loras", "--url", server.url, "--key", USER, cwd=tmp_path).stdout
    line = next(line for line in told.splitlines() if line.startswith("pixel_art_style"))
    assert ("pixel art" in line, "Image, Sell" in line) == (True, True)


# Who may


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("headers", "status", "detail"),
    [
        ({"X-API-Key": ""}, 401, "Missing admin API key. Provide X-API-Key header."),
        ({"X-API-Key": "wrong"}, 403, "Invalid admin API key. Admin access required."),
        ({"X-API-Key": USER}, 403, "Invalid admin API key. Admin access required."),
    ],
)
def test_only_an_admin_adds_loras(
    server: Program, method: str, headers: dict[str, str], status: int, detail: str
) -> None:
    for prefix in ("", "/compat/sd"):
        answer = server.request(method, f"{prefix}/add_new_lora?name=12345", headers=headers)
        assert (answer.status_code, answer.json()["detail"]) == (status, detail)
        assert answer.headers["cache-control"] == "no-store"


def test_a_service_without_an_admins_key_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, api_key=USER) as program:
        answer = program.request("POST", "/add_new_lora?name=7", headers={"X-API-Key": USER})
        assert (answer.status_code, answer.json()["detail"]) == (501, "Admin API key not configured on server")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_page_of_another_site_adds_nothing(server: Program, market: Civitai, method: str) -> None:
    heard = len(market.heard)
    assert add(server, 12346, method, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert add(server, 12346, method, Origin="https://evil.example").status_code == 403
    assert server.request("HEAD", "/add_new_lora?name=12346", headers=BOSS).status_code == 405
    assert len(market.heard) == heard


# What goes wrong


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("12348", 400, "something did go wrong with model Of another base! Its base model is 'Pony'; known: SD 1.5, "),
        ("404", 404, "Civitai has no model 404"),
        ("../../etc/passwd", 404, "searchterm ../../etc/passwd lead to 0 models"),
        ("12347", 503, "broken.safetensors is no safetensors file: "),
        ("", 422, "String should have at least 1 character"),
        ("x" * 501, 422, "String should have at most 500 characters"),
    ],
)
def test_what_cannot_be_added_is_told_and_nothing_is_kept(server: Program, name: str, status: int, detail: str) -> None:
    before = loras_dir(server), server.get("/get_available_loras").json()
    answer = add(server, name)
    assert answer.status_code == status, answer.text
    said = answer.json()["detail"]
    assert (said if isinstance(said, str) else said[0]["msg"]).startswith(detail)
    assert (loras_dir(server), server.get("/get_available_loras").json()) == before
    assert KEY not in answer.text


# For long


def test_the_service_answers_while_a_lora_comes_and_who_hangs_up_does_not_end_that(
    server: Program, market: Civitai
) -> None:
    ranges = len(market.large.ranges())
    market.large.faults = ["slow:2"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/add_new_lora?name=12346", headers=BOSS, timeout=0.5)
    assert server.get("/hello").status_code == 200
    with ThreadPoolExecutor(60) as pool:  # more than the threads that routes have
        answers = list(pool.map(lambda _: add(server, 12346), range(60)))
        assert server.get("/hello").status_code == 200
    assert {answer.status_code for answer in answers} == {200}
    assert all("here as slow_one" in answer.json() for answer in answers if answer.json())
    assert len(market.large.ranges()) == ranges + 1
    eventually(lambda: "slow_one" in server.get("/get_available_loras").json(), "the LoRA")
    assert KEY not in server.log


def test_a_service_that_stops_in_the_middle_ends_the_download_and_goes_on_with_it_later(
    tmp_path: Path, market: Civitai
) -> None:
    hosts = {"civitai_url": market.url, "pull_hosts": market.large.cdn}
    market.large.faults = ["slow:60"]
    ranges = len(market.large.ranges())
    with serving(tmp_path, **hosts) as server, ThreadPoolExecutor() as pool:
        waiting = pool.submit(add, server, 12346)
        eventually(lambda: any(part.stat().st_size for part in tmp_path.rglob("*.part")), "the first bytes")
        server.signal(signal.SIGTERM)
        answer = waiting.result()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        assert answer.json()["detail"] == "the service stops; asked again later, the download goes on"
        assert server.ended() == 0
    with serving(tmp_path, **hosts) as server:
        assert "here as slow_one" in add(server, 12346).json()
    assert [wanted[:6] for wanted in market.large.ranges()[ranges:]] == ["", "bytes="]


# In pictures


def test_a_lora_that_was_added_draws_in_the_very_next_job(tmp_path: Path) -> None:
    """Where the worker is another process, and has looked at the folders just before."""
    with civitai() as market:
        market.publish(55, "Ink Outline", (DATA / "loras" / "shapes-ink.safetensors").read_bytes())
        hosts = {"civitai_url": market.url, "pull_hosts": market.large.cdn}
        with serving(tmp_path, "--isolated", engine="diffusers", device="cpu", shipped_models=True, **hosts) as server:
            plain = picture(server.result(prompt=PROMPT, **DRAWING))
            assert "here as ink_outline" in add(server, 55).json()
            job = server.result(prompt=PROMPT, loras=["ink_outline"], **DRAWING)
            params = {"prompt": PROMPT, "negative_prompt": "", "model_id": "shapes", "lora": "ink_outline"}
            params |= {"num_inference_steps": 10, "guidance_scale": 5, "seed": 3, "width": 128, "height": 128}
            answer = server.request("POST", "/post_config", params=params)
    inked, by_config = picture(job), pixels(answer.content)
    assert [lora["name"] for lora in job["loras_applied"]] == ["ink_outline"]
    assert ink(plain) < 0.005
    for drawn in (inked, by_config):
        assert ink(drawn) > 0.03
        assert seen(drawn).background == seen(plain).background == asked(PROMPT).background


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def picture(status: dict[str, str]) -> NDArray[np.uint8]:
    return pixels(base64.b64decode(status["image"]))


def ink(drawn: NDArray[np.uint8]) -> float:
    """The share of a picture that is nearly black."""
    return float((drawn.max(2) < 70).mean())
