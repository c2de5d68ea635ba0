"""Requests made from the OpenAPI document, valid and not: none ends in a 5xx, and each answer is one that is documented."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_civitai import civitai
from fake_models import diffusers_folder
from serving import PATIENCE, Program, environment, serving

BESIDE_THE_DOCUMENT = (
    "positive_data_acceptance",  # which models there are is no part of it: a name of the right form may be refused
    "negative_data_rejection",  # numbers may come as strings
    "allow_header_conformance",  # a job could have the id "pause", so that path has GET and DELETE too
    "ignored_auth",  # more wrong keys than one address may try in a minute: 429. tests/test_access.py asks each route
    "use_after_free",  # DELETE cancels a job; that it was cancelled can be asked for later
)


KEY = "the-key-of-an-admin"  # without which no route answers that the document says needs one


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Program]:
    """A service whose limits let no job take long, and whose LoRAs come from this machine."""
    home = tmp_path / "home"
    models = home / "stable_diffusion" / "models"
    diffusers_folder(models / "small", sample_size=8)
    diffusers_folder(models / "unidiffuser", sample_size=8, pipeline="UniDiffuserPipeline")
    limits = {"max_pixels": 64 * 64, "max_batch": 2, "max_queue": 0, "max_seconds": 5}
    with civitai() as market:
        shop = {"civitai_url": market.url, "pull_hosts": market.large.cdn}
        with serving(home, model="small", admin_api_key=KEY, **limits, **shop) as program:
            program.key = KEY
            yield program


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=[pytest.mark.chaos, pytest.mark.timeout(3600)])])
def test_no_request_that_the_document_leads_to_ends_in_a_5xx(server: Program, tmp_path: Path, examples: int) -> None:
    done = subprocess.run(
        [
            *(f"{sysconfig.get_path('scripts')}/st", "run", f"{server.url}/openapi.json", "--no-color"),
            *("--phases", "examples,coverage,fuzzing,stateful", "--mode", "all"),
            *("--header", f"X-API-Key: {KEY}"),
            *("--max-examples", str(examples), "--generation-deterministic"),
            *(("--exclude-path", "/inpaint") if examples < 100 else ()),  # its body is that of /img2img
            *("--checks", "all", "--exclude-checks", ",".join(BESIDE_THE_DOCUMENT)),
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE * examples,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Stateful (not applicable)" not in done.stdout
    assert "failed" not in server.log
    assert server.result(model="small", steps=1)["state"] == "done"


def test_the_document_says_what_can_be_asked_of_a_stored_job(server: Program) -> None:
    document = server.get("/openapi.json").json()
    links = document["paths"]["/txt2img"]["post"]["responses"]["200"]["links"]
    for method, link in links.items():
        assert link["operationRef"] == f"#/paths/~1queue~1{{job_id}}/{method}"
        assert method in document["paths"]["/queue/{job_id}"]
