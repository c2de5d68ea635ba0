"""The UniDiffuser API by HTTP, as its clients call it; and what its jobs look like elsewhere."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_pipelines
from fake_models import diffusers_folder
from PIL import Image
from serving import PATIENCE, Program, eventually, serving

from diffusion_api import images

NAME = "unidiffuser-v1"
PARTS = {"unet": ["unidiffuser", "UniDiffuserModel"]}
NOT_INSTALLED = "the operator can fetch it: diffusion-api pull thu-ml/unidiffuser-v1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with the stub engine, a UniDiffuser and another model."""
    home = tmp_path_factory.mktemp("unidiffuser")
    models = home / "stable_diffusion" / "models"
    diffusers_folder(models / NAME, pipeline="UniDiffuserPipeline", index=dict(PARTS))
    diffusers_folder(models / "stable-diffusion-v1-5")
    with serving(home, max_steps=100, max_body=2**20) as program:
        yield program


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service that runs a tiny UniDiffuser, and nothing else."""
    home = tmp_path_factory.mktemp("real")
    tiny_pipelines.save(tiny_pipelines.unidiffuser(), home / "stable_diffusion" / "models" / NAME)
    with serving(home, engine="diffusers", device="cpu") as program:
        yield program


def photo(width: int = 96, height: int = 64, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "JPEG")
    return file.getvalue()


def asked(server: Program, path: str, image: bytes | None = photo(), **options: Any) -> httpx.Response:
    headers = options.pop("headers", None)
    files = {"image": ("photo.jpg", image, "image/jpeg")} if image is not None else None
    return server.request("POST", path, params=options, files=files, headers=headers)


def told(answer: httpx.Response, status: int = 422) -> str:
    """What a refusal says; of the parameters, name by name."""
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    if isinstance(detail, str):
        return detail
    return "; ".join(f"{'.'.join(fault['loc'])}: {fault['msg']}" for fault in detail)


# What the original's manual prints


def test_the_captioning_example_works_as_printed(real: Program, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo())
    with (tmp_path / "photo.jpg").open("rb") as file:
        files = {"image": ("photo.jpg", file, "image/jpeg")}
        response = httpx.post(f"{real.url}/img2prompt", files=files, timeout=PATIENCE)
    caption = response.text
    assert response.status_code == 200, caption
    assert isinstance(json.loads(caption), str)
    status = real.status(response.headers["X-Job-Id"])
    assert status["caption"] == response.json()
    assert (status["state"], status["progress"], status["seed"]) == ("done", 100, 0)


def test_the_embeddings_example_works_as_printed(real: Program, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo())
    with (tmp_path / "photo.jpg").open("rb") as file:
        files = {"image": ("photo.jpg", file, "image/jpeg")}
        response = httpx.post(f"{real.url}/img2embed", files=files, timeout=PATIENCE)
    embeddings = response.json()
    assert len(embeddings["CLIP_embeddings"]) == 512
    assert len(embeddings["vae_emb"]) == 4
    assert np.array(embeddings["vae_emb"]).shape == (4, 64, 64)
    assert np.isfinite(embeddings["CLIP_embeddings"]).all()


def test_pictures_are_drawn_from_words_in_a_grid_and_the_same_again(real: Program) -> None:
    two, second = (
        asked(real, "/prompt2img", None, prompt="a red cat", num_inference_steps=2, **options)
        for options in ({"count_returned": 2, "seed": 4}, {"seed": 5})
    )
    assert two.headers["content-type"] == "image/png", two.text
    sheet, picture = (np.asarray(Image.open(io.BytesIO(answer.content))) for answer in (two, second))
    assert sheet.shape == (512, 1024, 3)
    assert np.array_equal(sheet[:, 512:], picture)
    assert picture.std() > 10


def test_steps_guidance_and_seed_of_a_caption_are_used(real: Program) -> None:
    plain, *others = (
        asked(real, "/img2prompt", num_inference_steps=2, **options).json()
        for options in ({}, {"seed": 3}, {"guidance_scale": 1})
    )
    assert plain not in others


def test_a_picture_of_the_native_api_may_be_drawn_by_it(real: Program) -> None:
    status = real.result(prompt="a red cat", steps=2, n=2, seed=4, fileType="png")
    assert (status["width"], status["height"]) == (512, 512)
    assert "sampler" not in " ".join(status.get("warnings", []))


# What is asked for


@pytest.mark.parametrize(("count", "size"), [(1, (512, 512)), (4, (2048, 512)), (5, (1536, 1024))])
def test_pictures_stand_in_a_grid(server: Program, count: int, size: tuple[int, int]) -> None:
    answer = asked(server, "/prompt2img", None, prompt="x", count_returned=count, seed=7)
    assert Image.open(io.BytesIO(answer.content)).size == size
    status = server.status(answer.headers["X-Job-Id"])
    assert (status["seed"], len(status.get("images", [1]))) == (7, count)
    assert "Seed: 7" in (images.read_infotext(answer.content) or "")


def test_what_is_said_is_asked_for_and_the_rest_as_the_original_has_it(server: Program) -> None:
    for path, params, wanted in (
        ("/img2prompt", {}, {"kind": "caption", "steps": 20, "guidance_scale": 7.5, "seed": 0}),
        (
            "/img2prompt",
            {"num_inference_steps": 5, "guidance_scale": 2, "seed": 9},
            {"steps": 5, "guidance_scale": 2.0},
        ),
        ("/img2embed", {"seed": 9, "torch_dtype": "float32"}, {"kind": "embed", "seed": 9}),
        ("/prompt2img", {"width": 515, "height": 519}, {"width": 512, "height": 512, "steps": 20, "seed": 0}),
    ):
        answer = asked(server, path, **params)
        assert answer.status_code == 200, answer.text
        record = next((server.home / "queue").glob(f"done/*{answer.headers['X-Job-Id']}.json"))
        request = json.loads(record.read_text())["request"]
        assert request.items() >= wanted.items()
        assert request["model"] == NAME


def test_a_negative_seed_draws_one(server: Program) -> None:
    answers = [asked(server, "/img2prompt", seed=-1) for _ in range(2)]
    seeds = {server.status(answer.headers["X-Job-Id"])["seed"] for answer in answers}
    assert len(seeds) == 2
    assert min(seeds) >= 0


# What is refused


@pytest.mark.parametrize("path", ["/img2prompt", "/img2embed"])
def test_without_a_picture_the_original_s_words_are_a_refusal(server: Program, path: str) -> None:
    assert told(asked(server, path, None)) == "No image was passed!"
    empty = server.request("POST", path, files={"image": ("", b"")})
    assert told(empty) == "No image was passed!"


@pytest.mark.parametrize("data", [b"", b"no picture", photo()[:300], b"GIF89a"], ids=["empty", "text", "cut", "gif"])
@pytest.mark.parametrize("path", ["/img2prompt", "/img2embed"])
def test_a_malformed_picture_is_refused(server: Program, path: str, data: bytes) -> None:
    assert told(asked(server, path, data)).startswith("body.image: image")


def test_a_picture_beyond_the_limit_is_too_large(server: Program) -> None:
    assert asked(server, "/img2prompt", bytes(2**20 + 1)).status_code == 413


@pytest.mark.parametrize(
    ("path", "params", "reason"),
    [
        ("/prompt2img", {"width": 768}, "query.width: width x height is 768x512; model 'unidiffuser-v1' makes 512x512"),
        ("/prompt2img", {"count_returned": 0}, "query.count_returned: Input should be greater than or equal to 1"),
        (
            "/prompt2img",
            {"num_inference_steps": 101},
            "query.num_inference_steps: num_inference_steps is 101; it may be",
        ),
        (
            "/img2prompt",
            {"num_inference_steps": 101},
            "query.num_inference_steps: num_inference_steps is 101; it may be",
        ),
        ("/img2prompt", {"guidance_scale": "nan"}, "query.guidance_scale: Input should be"),
        ("/img2prompt", {"seed": 2**32}, "query.seed: seed is 4294967296; it may be 0 to 4294967295"),
        (
            "/img2embed",
            {"torch_dtype": "int8"},
            "query.torch_dtype: Input should be 'float16', 'bfloat16', 'float32' or",
        ),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(
    server: Program, path: str, params: dict[str, Any], reason: str
) -> None:
    assert told(asked(server, path, **params)).startswith(reason)


def test_the_native_api_refuses_a_size_that_the_model_does_not_make(server: Program) -> None:
    answer = server.post(prompt="x", model=NAME, width=768)
    assert (answer.status_code, answer.json()["detail"]) == (
        400,
        "width x height is 768x512; model 'unidiffuser-v1' makes 512x512 and no other size",
    )


def test_not_installed_says_how_to_get_it(stub_server: Program, tmp_path: Path) -> None:
    for path in ("/prompt2img", "/img2prompt", "/img2embed"):
        assert told(asked(stub_server, path), 503) == f"thu-ml/unidiffuser-v1 is not installed; {NOT_INSTALLED}"
    half = tmp_path / "stable_diffusion" / "models" / "models--thu-ml--unidiffuser-v1"
    diffusers_folder(half, pipeline="UniDiffuserPipeline", index=dict(PARTS))
    (half / "unet" / "diffusion_pytorch_model.safetensors").rename(half / "unet" / "diffusion_pytorch_model.bin")
    with serving(tmp_path) as broken:
        reason = "cannot be used: its unet/ holds no safetensors weights, only .bin, which can run code when loaded"
        assert told(asked(broken, "/img2prompt"), 503).startswith(f"thu-ml/unidiffuser-v1 {reason}")


# Its jobs among the others


def test_each_answer_is_a_job_like_any_other(server: Program) -> None:
    rows = {}
    for path in ("/img2prompt", "/img2embed"):
        answer = asked(server, path, num_inference_steps=3) if path == "/img2prompt" else asked(server, path)
        rows[path] = server.get("/queue").json()["jobs"][0] | {"answer": answer}
        assert rows[path]["job_id"] == answer.headers["X-Job-Id"]
        assert server.get(f"/queue/{rows[path]['job_id']}/image").status_code == 404
    said, counted = rows["/img2prompt"], rows["/img2embed"]
    assert (said["kind"], said["model"], said["steps"], said["pictures"]) == ("caption", NAME, 3, 0)
    assert (counted["kind"], counted["model"], counted["steps"], counted["width"]) == ("embed", NAME, None, 512)
    status = server.status(counted["job_id"])
    assert status["embeddings"] == counted["answer"].json()
    assert (server.home / status["output_path"]).read_bytes() == counted["answer"].content
    assert "embeddings" not in server.get(f"/queue/{counted['job_id']}?image=false").json()
    assert server.status(said["job_id"])["caption"] == said["answer"].json()


def test_a_caption_is_made_again_and_compared(server: Program) -> None:
    for path in ("/img2prompt", "/img2embed"):
        job_id = asked(server, path).headers["X-Job-Id"]
        again = server.request("POST", f"/queue/{job_id}/reproduce").json()["job_id"]
        assert server.wait(again)["reproduces"] == {"job_id": job_id, "matched": True, "differences": []}


def test_numbers_that_were_deleted_are_gone(server: Program) -> None:
    headers = {"Idempotency-Key": "gone"}
    first = asked(server, "/img2embed", headers=headers)
    (server.home / server.status(first.headers["X-Job-Id"])["output_path"]).unlink()
    assert "were deleted" in told(asked(server, "/img2embed", headers=headers), 410)


def test_a_caller_may_be_told_where_the_job_is_in_place_of_waiting(server: Program) -> None:
    answer = asked(server, "/img2prompt", headers={"Prefer": "respond-async"})
    assert (answer.status_code, answer.headers["Location"]) == (202, f"/queue/{answer.json()['job_id']}")
    assert server.wait(answer.json()["job_id"])["caption"]


def test_a_key_sent_again_makes_no_second_job_and_stands_for_one_route(server: Program) -> None:
    headers = {"Idempotency-Key": "once"}
    first, again = (asked(server, "/img2embed", headers=headers) for _ in range(2))
    assert first.headers["X-Job-Id"] == again.headers["X-Job-Id"]
    assert first.content == again.content
    assert asked(server, "/img2prompt", headers=headers).status_code == 422


def test_the_routes_stand_under_compat_too(server: Program) -> None:
    assert isinstance(asked(server, "/compat/unidiffuser/img2prompt").json(), str)


def test_the_model_is_listed_with_its_size(server: Program) -> None:
    (row,) = (row for row in server.get("/models").json()["models"] if row["name"] == NAME)
    assert row["type"] == "standard"
    assert row["path"].endswith(NAME)


def test_a_running_caption_is_cancelled_and_one_whose_process_is_killed_is_run_again(real: Program) -> None:
    def running() -> str:
        answer = asked(real, "/img2prompt", num_inference_steps=150, headers={"Prefer": "respond-async"})
        job_id: str = answer.json()["job_id"]
        eventually(lambda: real.status(job_id)["current_phase"] == "captioning", "captioning")
        return job_id

    cancelled = real.request("DELETE", f"/queue/{running()}").json()
    assert (cancelled["cancelled"], cancelled["progress"] < 100) == (True, True)
    left = running()
    real.kill()
    with serving(real.home) as program:
        assert program.wait(left)["caption"].startswith("a picture of ")
