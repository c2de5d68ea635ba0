"""The configuration API by HTTP, as its clients call it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fake_models import LORA_KEYS, checkpoint, diffusers_folder
from PIL import Image
from serving import PATIENCE, ROOT, Program, serving

from diffusion_api import images

USER, ADMIN = "your-api-key", "the-admins-key"
SD1, SD21, SDXL = (
    "runwayml/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-xl-base-1.0",
)


@dataclass
class LanguageModel:
    """A service that answers a text with what it says, see ``ANSWERS``; it remembers what it was asked."""

    port: int = 0
    asked: list[tuple[str, dict[str, list[str]]]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def answer(self, text: str) -> tuple[int, bytes]:
        """Status and body."""
        if text == "wait":
            self.over.wait(PATIENCE)
        answers = {"plain": (200, b"no JSON"), "object": (200, b'{"a": 1}'), "refuse": (500, b"oops")}
        answers |= {"endless": (200, bytes(2 * 2**20)), "elsewhere": (302, b"")}
        return answers.get(text, (200, json.dumps(f"You said: {text}").encode()))


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    """The language model that the server's operator runs."""
    model = LanguageModel()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query, keep_blank_values=True)
            model.asked.append((url.path, query))
            status, body = model.answer(query["text"][0])
            with suppress(OSError):  # nobody listens any more
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    model.port = service.server_address[1]
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield model
    model.over.set()
    service.shutdown()
    service.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> Iterator[Program]:
    """A service with the stub engine and the models of the original's examples; callers need keys."""
    home = tmp_path_factory.mktemp("config")
    models = home / "stable_diffusion" / "models"
    diffusers_folder(models / "stable-diffusion-v1-5")
    diffusers_folder(models / "stable-diffusion-2-1", unet={"cross_attention_dim": 1024})
    diffusers_folder(models / "stable-diffusion-xl-base-1.0", pipeline="StableDiffusionXLPipeline", sample_size=128)
    checkpoint(home / "stable_diffusion" / "loras" / "pixel_art_style" / "lora.safetensors", LORA_KEYS)
    asks = {"llm_host": "localhost", "llm_port": model.port, "llm_seconds": 1}
    with serving(home, api_key=f" {USER} ,another", admin_api_key=ADMIN, **asks) as program:
        program.key = USER
        yield program


def png(width: int, height: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def drawn(answer: httpx.Response) -> Image.Image:
    """The picture of an answer that must be one."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content))


def config(server: Program, **options: Any) -> httpx.Response:
    """The answer to ``POST /post_config`` with these parameters, or those in ``params``; ``files`` is the form."""
    files = options.pop("files", None)
    params = options.pop("params", options)
    return server.request("POST", "/post_config", params=params, files=files)


def request_of(server: Program, answer: httpx.Response) -> dict[str, Any]:
    """The request that was stored for an answer."""
    record = next((server.home / "queue").glob(f"done/*{answer.headers['X-Job-Id']}.json"))
    request: dict[str, Any] = json.loads(record.read_text())["request"]
    return request


def told(answer: httpx.Response, status: int = 422) -> str:
    """What a refusal says; of the parameters, name by name."""
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    if isinstance(detail, str):
        return detail
    return "; ".join(f"{'.'.join(fault['loc'])}: {fault['msg']}" for fault in detail)


# What the original's manual prints


def test_the_text_to_image_example_works_as_printed(server: Program) -> None:
    headers = {"X-API-Key": "your-api-key"}
    response = httpx.post(
        f"{server.url}/post_config",
        headers=headers,
        params={
            "prompt": "A serene mountain landscape, oil painting style",
            "model_id": "stabilityai/stable-diffusion-2-1",
            "num_inference_steps": 30,
            "guidance_scale": 7.5,
            "width": 768,
            "height": 768,
            "count_returned": 4,
            "seed": 42,
        },
        timeout=PATIENCE,
    )
    assert drawn(response).size == (4 * 768, 768)
    asked = request_of(server, response)
    assert (asked["model"], asked["steps"], asked["guidance_scale"]) == ("stable-diffusion-2-1", 30, 7.5)
    assert (asked["seed"], asked["count"], asked["sampler"]) == (42, 4, "euler")
    assert asked["negative_prompt"] == "blurry, low resolution, low quality"


def test_the_image_to_image_example_works_as_printed(server: Program, tmp_path: Path) -> None:
    (tmp_path / "input.jpg").write_bytes(png(200, 120))
    with (tmp_path / "input.jpg").open("rb") as file:
        files = {"image": ("input.jpg", file, "multipart/form-data")}
        response = httpx.post(
            f"{server.url}/post_config",
            headers={"X-API-Key": "your-api-key"},
            params={
                "prompt": "Make it sunset",
                "model_id": "stabilityai/stable-diffusion-2-1",
                "num_inference_steps": 20,
            },
            files=files,
            timeout=PATIENCE,
        )
    assert drawn(response).size == (200, 120)
    asked = request_of(server, response)
    assert (asked["kind"], asked["strength"], asked["seed"]) == ("img2img", 0.8, 0)


def test_the_lora_example_works_as_printed(server: Program) -> None:
    response = httpx.post(
        f"{server.url}/post_config",
        headers={"X-API-Key": "your-api-key"},
        params={
            "prompt": "pixel_art_style, a cat wearing sunglasses",
            "lora": "pixel_art_style",
            "model_id": "stabilityai/stable-diffusion-xl-base-1.0",
        },
        timeout=PATIENCE,
    )
    assert drawn(response).size == (512, 512)
    assert [lora["name"] for lora in request_of(server, response)["loras"]] == ["pixel_art_style"]


# Our own manual

PAGE = (ROOT / "docs" / "configuration-api.md").read_text("utf-8")
EXAMPLES = re.findall(r"```bash\n(.*?)\n```(?:\n\n```json\n(.*?)\n```)?", PAGE, re.DOTALL)


@pytest.mark.parametrize(("command", "documented"), EXAMPLES, ids=[command[-60:] for command, _ in EXAMPLES])
def test_an_example_of_our_page_is_answered_as_it_says(
    server: Program, tmp_path: Path, command: str, documented: str
) -> None:
    (tmp_path / "input.jpg").write_bytes(png(64, 64))
    called = command.replace("curl", "curl -f", 1).replace("http://localhost:8000", server.url)
    done = subprocess.run(
        ["bash", "-euc", called],
        cwd=tmp_path,
        env={"KEY": USER, "PATH": os.environ["PATH"]},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    drawn_files = [*tmp_path.glob("*.png")]
    assert len(drawn_files) == command.count(" -o ")
    for file in drawn_files:
        assert Image.open(file).format == "PNG"
    if documented:
        answer, shown = json.loads(done.stdout), json.loads(documented)
        assert (answer.keys() == shown.keys()) if "buffer_status" in command else (answer == shown)


# Parameters


def test_without_any_parameter_the_original_s_defaults_hold(server: Program) -> None:
    answer = config(server)
    assert drawn(answer).size == (512, 512)
    asked = request_of(server, answer)
    assert asked["prompt"]
    assert (asked["model"], asked["steps"], asked["guidance_scale"]) == ("stable-diffusion-v1-5", 20, 7.5)
    assert (asked["seed"], asked["count"], asked["loras"]) == (0, 1, [])
    assert config(server).content == answer.content, "the seed is fixed"


def test_a_negative_seed_draws_one(server: Program) -> None:
    seeds = {request_of(server, config(server, seed=-1, num_inference_steps=1))["seed"] for _ in range(4)}
    assert len(seeds) > 1
    assert max(seeds) > 255


def test_sizes_are_rounded_down_to_multiples_of_eight(server: Program) -> None:
    assert drawn(config(server, width=127, height=71)).size == (120, 64)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (9, 3, 3)])
def test_pictures_stand_in_a_grid_with_seeds_that_count_up(
    server: Program, count: int, rows: int, columns: int
) -> None:
    sheet = drawn(config(server, count_returned=count, width=64, height=64, seed=7))
    assert sheet.size == (64 * columns, 64 * rows)
    cells = [sheet.crop((x, y, x + 64, y + 64)) for y in range(0, 64 * rows, 64) for x in range(0, 64 * columns, 64)]
    for number, cell in enumerate(cells[:count]):
        alone = drawn(config(server, width=64, height=64, seed=7 + number))
        assert cell.tobytes() == alone.tobytes()
    assert all(cell.getbbox() is None for cell in cells[count:]), "what is left over is black"


@pytest.mark.parametrize("count", [1, 2])
def test_the_png_says_how_it_was_made(server: Program, count: int) -> None:
    answer = config(server, prompt="a lighthouse", count_returned=count, width=64, height=64, seed=3)
    text = images.read_infotext(answer.content)
    assert text is not None
    assert text.startswith("a lighthouse\nNegative prompt: blurry")
    assert "Sampler: Euler" in text
    assert "Seed: 3" in text


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_torch_dtype_is_one_of_its_choices(server: Program, dtype: str) -> None:
    assert drawn(config(server, torch_dtype=dtype, width=64, height=64)).size == (64, 64)


@pytest.mark.parametrize("lora", ["", "None", "none"])
def test_clients_that_mean_no_lora_write_it_in_several_ways(server: Program, lora: str) -> None:
    assert request_of(server, config(server, lora=lora, width=64, height=64))["loras"] == []


@pytest.mark.parametrize(
    ("model_id", "installed"),
    [
        (SD1, "stable-diffusion-v1-5"),
        ("SD 1.5", "stable-diffusion-v1-5"),
        (SD21, "stable-diffusion-2-1"),
        (SDXL, "stable-diffusion-xl-base-1.0"),
        ("stable-diffusion-2-1", "stable-diffusion-2-1"),
        ("", "stable-diffusion-v1-5"),
    ],
)
def test_ids_of_the_hub_mean_installed_models(server: Program, model_id: str, installed: str) -> None:
    assert request_of(server, config(server, model_id=model_id, width=64, height=64))["model"] == installed


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (
            {"model_id": "black-forest-labs/FLUX.1-dev"},
            "query.model_id: model_id 'black-forest-labs/FLUX.1-dev' is not",
        ),
        ({"model_id": "nobody/nothing"}, "one of stable-diffusion-2-1, stable-diffusion-v1-5"),
        ({"lora": "no_such_style"}, "query.lora: lora 'no_such_style' is not installed; one of: pixel_art_style"),
        ({"torch_dtype": "float8"}, "query.torch_dtype: Input should be 'float16'"),
        ({"count_returned": 0}, "query.count_returned: Input should be greater than or equal to 1"),
        ({"count_returned": 1000}, "query.count_returned: count_returned is 1000; it may be 1 to 16"),
        ({"num_inference_steps": 0}, "query.num_inference_steps: "),
        (
            {"num_inference_steps": 10**6},
            "query.num_inference_steps: num_inference_steps is 1000000; it may be 1 to 150",
        ),
        ({"width": 7}, "query.width: "),
        ({"width": 60_000, "height": 60_000}, "query.width: width x height is"),
        ({"guidance_scale": "nan"}, "query.guidance_scale: "),
        ({"guidance_scale": "much"}, "query.guidance_scale: "),
        ({"seed": 2**32}, "query.seed: seed is 4294967296"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(server: Program, params: dict[str, Any], reason: str) -> None:
    assert reason in told(config(server, params=params))


# Pictures


@pytest.mark.parametrize("kind", ["multipart/form-data", "image/png", "text/plain", ""])
def test_what_the_part_of_a_picture_says_of_itself_does_not_matter(server: Program, kind: str) -> None:
    files = {"image": ("file.png", png(64, 72), kind, {"Expires": "0"})}
    answer = config(server, params={"model_id": SD1}, files=files)
    assert drawn(answer).size == (64, 72)
    assert request_of(server, answer)["kind"] == "img2img"


def test_a_picture_is_drawn_over_as_the_pipelines_of_the_original_do(server: Program) -> None:
    for model, strength in ((SD1, 0.8), (SD21, 0.8), (SDXL, 0.3)):
        answer = config(server, params={"model_id": model}, files={"image": ("i.png", png(64, 64))})
        assert request_of(server, answer)["strength"] == strength


def test_a_picture_has_its_own_size_or_the_one_that_is_asked_for(server: Program) -> None:
    files = {"image": ("i.png", png(101, 67))}
    assert drawn(config(server, files=files, params={})).size == (96, 64)
    assert drawn(config(server, files=files, params={"width": 128, "height": 80})).size == (128, 80)


def test_a_picture_that_lies_on_its_side_is_turned_upright(server: Program) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 128)).save(file, "JPEG", exif=exif)
    assert drawn(config(server, params={}, files={"image": ("i.jpg", file.getvalue())})).size == (128, 64)


def test_a_lora_works_with_a_picture_too(server: Program) -> None:
    answer = config(server, params={"lora": "pixel_art_style"}, files={"image": ("i.png", png(64, 64))})
    asked = request_of(server, answer)
    assert (asked["kind"], asked["loras"][0]["name"]) == ("img2img", "pixel_art_style")


@pytest.mark.parametrize("data", [b"no picture", b"\x89PNG\r\n\x1a\n", png(64, 64)[:60], b""])
def test_a_broken_picture_is_refused(server: Program, data: bytes) -> None:
    assert told(config(server, params={}, files={"image": ("i.png", data)})).startswith("body.image: image: ")


def test_a_picture_that_would_be_overlooked_is_refused(server: Program) -> None:
    post = server.request
    assert "'picture'" in told(config(server, params={}, files={"picture": ("i.png", png(8, 8))}))
    assert "multipart" in told(post("POST", "/post_config", content=png(8, 8)), 415)
    assert "multipart" in told(post("POST", "/post_config", json={"prompt": "a dog"}), 415)
    assert "'prompt'" in told(post("POST", "/post_config", data={"prompt": "a dog"}))
    assert "boundary" in told(
        post("POST", "/post_config", content=b"x", headers={"content-type": "multipart/form-data"}), 400
    )


def test_an_empty_form_is_no_picture(server: Program) -> None:
    empty = {"image": ("", b"", "application/octet-stream")}
    assert request_of(server, config(server, params={"width": 64}, files=empty))["kind"] == "txt2img"


# Jobs


def test_each_answer_is_a_job_like_any_other(server: Program) -> None:
    answer = config(server, width=64, height=64, count_returned=2)
    status = server.status(answer.headers["X-Job-Id"])
    assert status["state"] == "done"
    assert len(status["output_paths"]) == 2
    assert status["payload"] == {"width": 64, "height": 64, "count_returned": 2}


def test_a_parameter_that_is_not_known_is_told(server: Program) -> None:
    answer = config(server, width=64, height=64, negativ_prompt="blue")
    warnings = server.status(answer.headers["X-Job-Id"])["warnings"]
    assert warnings == ["unknown parameter 'negativ_prompt' was ignored; did you mean 'negative_prompt'?"]


def test_a_caller_may_be_told_where_the_job_is_in_place_of_waiting(server: Program) -> None:
    answer = server.request("POST", "/post_config", params={"width": 64}, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202
    assert server.wait(answer.json()["job_id"])["state"] == "done"


def test_the_job_of_who_hangs_up_goes_on(server: Program) -> None:
    slow = {"prompt": "stub:seconds=0.1", "num_inference_steps": 30, "width": 64, "seed": 4711}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/post_config", params=slow, headers={"X-API-Key": USER}, timeout=1)
    (job,) = (job for job in server.get("/queue").json()["jobs"] if job["seed"] == 4711)
    assert job["state"] in ("queued", "loading", "processing")
    assert server.wait(job["job_id"])["state"] == "done"


def test_a_key_sent_again_makes_no_second_job(server: Program) -> None:
    headers = {"Idempotency-Key": "one"}
    first, again = (
        server.request("POST", "/post_config", params={"seed": -1, "width": 64}, headers=headers) for _ in range(2)
    )
    assert again.headers["X-Job-Id"] == first.headers["X-Job-Id"]
    assert again.content == first.content
    assert "another" in told(server.request("POST", "/post_config", params={"seed": 5}, headers=headers))


@pytest.mark.parametrize(
    ("prompt", "status", "reason"),
    [("stub:oom=1", 422, "out of memory"), ("stub:nan=1", 400, "no number"), ("stub:fail=1", 500, "the engine failed")],
)
def test_a_job_that_fails_says_why(server: Program, prompt: str, status: int, reason: str) -> None:
    assert reason in told(config(server, prompt=prompt, width=64, height=64), status)


# Keys


def test_each_key_of_the_list_opens_and_no_other(server: Program) -> None:
    def ask(key: str | None, path: str = "/get_available_stable_diffs") -> httpx.Response:
        return httpx.get(server.url + path, headers={} if key is None else {"X-API-Key": key})

    assert [ask(key).status_code for key in (USER, "another", ADMIN)] == [200, 200, 200]
    missing = ask(None)
    assert told(missing, 401) == "Missing API key. Provide X-API-Key header."
    assert missing.headers["WWW-Authenticate"] == "ApiKey"
    assert told(ask("wrong"), 403) == "Invalid API key"


# Lists


def test_the_models_are_those_of_the_original_and_those_that_are_installed(server: Program) -> None:
    found = server.get("/get_available_stable_diffs").json()
    assert (
        found.items()
        >= {
            "SD 1.5": "runwayml/stable-diffusion-v1-5",
            "SD 2.0": "stabilityai/stable-diffusion-2",
            "SD 2.1": "stabilityai/stable-diffusion-2-1",
            "SDXL 1.0": "stabilityai/stable-diffusion-xl-base-1.0",
            "Flux.1 D": "black-forest-labs/FLUX.1-dev",
        }.items()
    )


def test_the_parameters_are_shown_with_their_defaults(server: Program) -> None:
    found = server.get("/get_implemented_parameters").json()
    assert found["model_config"] == {"torch_dtype": "float16"}
    assert found["prompt_config"] == {
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "negative_prompt": "blurry, low resolution, low quality",
    }
    rest = {name: found[name] for name in ("model_id", "count_returned", "seed", "width", "height", "lora")}
    assert rest == {"model_id": SD1, "count_returned": 1, "seed": 0, "width": 512, "height": 512, "lora": None}
    assert found["prompt"]


def test_a_prompt_is_shown_as_the_tokens_that_clip_reads(server: Program) -> None:
    answer = server.get("/get_model_embedding", params={"prompt": "A (photorealistic:1.4) Lighthouse, 42"})
    assert answer.json() == ["a", "photo", "realistic", "lighthouse", ",", "4", "2"]
    assert server.get("/get_model_embedding").json()[0] == "ein"


# The language model


@pytest.mark.parametrize("path", ["/llm_interface", "/llm_prompt_assistance"])
@pytest.mark.parametrize("text", ["a dog", "100% & more? #1 +/=", "Größe: 日本 🙂", "x" * 3000, ""])
def test_a_text_goes_to_the_language_model_as_it_is(
    server: Program, model: LanguageModel, path: str, text: str
) -> None:
    answer = server.get(path, params={"text": text})
    assert (answer.status_code, answer.json()) == (200, f"You said: {text}")
    assert model.asked[-1] == (path, {"text": [text]})


def test_the_role_goes_with_it(server: Program, model: LanguageModel) -> None:
    server.get("/llm_interface", params={"text": "hello", "role": "a poet & a cook"})
    assert model.asked[-1][1] == {"text": ["hello"], "role": ["a poet & a cook"]}


@pytest.mark.parametrize(("text", "said"), [("plain", "no JSON"), ("object", '{"a": 1}')])
def test_what_is_no_json_text_comes_back_as_it_is(server: Program, text: str, said: str) -> None:
    assert server.get("/llm_interface", params={"text": text}).json() == said


@pytest.mark.parametrize("text", ["refuse", "endless", "elsewhere"])
def test_a_language_model_that_answers_badly_could_not_be_reached(server: Program, text: str) -> None:
    answer = server.get("/llm_interface", params={"text": text})
    assert (answer.status_code, answer.json()) == (200, "could not reach LLM")


def test_a_language_model_that_takes_long_holds_up_nobody(server: Program) -> None:
    with ThreadPoolExecutor(50) as pool:
        waiting = [pool.submit(server.get, "/llm_interface", params={"text": "wait"}) for _ in range(50)]
        assert server.get("/hello").status_code == 200
        assert drawn(config(server, width=64, height=64)).size == (64, 64)
        answers = [each.result().json() for each in waiting]
    assert answers == ["could not reach LLM"] * 50


def test_what_is_asked_is_private(server: Program) -> None:
    server.get("/llm_interface", params={"text": "refuse", "role": "a-secret-role"})
    config(server, prompt="a-secret-prompt", width=64, height=64)
    assert "could not reach LLM: it answered with status 500" in server.log
    assert "a-secret" not in server.log


def test_without_a_language_model_nobody_waits(stub_server: Program) -> None:
    assert stub_server.get("/llm_interface", params={"text": "hello"}).json() == "could not reach LLM"
    assert "DIFFUSION_API_LLM_HOST" in stub_server.log
    assert told(stub_server.get("/llm_interface")) == "query.text: Field required"


# The place where the dialect is alone


def test_the_routes_stand_under_compat_too(server: Program) -> None:
    answer = server.request("POST", "/compat/sd/post_config", params={"width": 64, "height": 64})
    assert drawn(answer).size == (64, 64)
    assert server.get("/compat/sd/buffer_status/").json()["is_loaded"] is False
