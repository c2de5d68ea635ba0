"""``/compat/<name>``, where a dialect is alone: the same routes, refusals and rules as at the root."""

from __future__ import annotations

import re

import pytest
from serving import Program, eventually

ALONE = {
    "diffusionapi": "/queue/{job_id}",
    "backend": "/examples",
    "sd": "/get_available_loras",
    "tasks": "/blob/{token}",
}
"""Dialects, each with one of its GET routes, which need no token here."""


def test_a_job_is_posted_and_read_under_the_name_of_its_dialect(stub_server: Program) -> None:
    answer = stub_server.request("POST", "/compat/diffusionapi/txt2img", json={"prompt": "x", "model": "small"})
    job_id = answer.json()["job_id"]
    assert answer.headers["X-Job-Id"] == job_id
    status = stub_server.get(f"/compat/diffusionapi/queue/{job_id}?wait=30").json()
    assert status["state"] == "done"
    assert stub_server.status(job_id)["image"] == status["image"]


def test_a_path_that_a_dialect_does_not_have_is_not_found_there(stub_server: Program) -> None:
    for path in ("/compat/diffusionapi/nope", "/compat/diffusionapi", "/compat/nope/txt2img"):
        answer = stub_server.get(path)
        assert (answer.status_code, answer.json()["detail"]) == (404, f"no such route: GET {path}")


def test_a_wrong_method_is_refused_there_with_the_right_ones(stub_server: Program) -> None:
    answer = stub_server.request("PUT", "/compat/diffusionapi/queue/x")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, DELETE")


@pytest.mark.parametrize(("name", "path"), ALONE.items())
def test_the_places_are_told_apart_by_the_metrics_and_not_in_the_document(
    stub_server: Program, name: str, path: str
) -> None:
    stub_server.get(re.sub(r"{\w+}", "x", f"/compat/{name}{path}"))
    template = f'route="/compat/{name}{path}"'
    eventually(lambda: template in stub_server.get("/metrics", headers={"Accept": "text/plain"}).text, template)
    assert not [path for path in stub_server.get("/openapi.json").json()["paths"] if path.startswith("/compat")]
