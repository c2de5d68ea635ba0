"""The contact sheets of ``docs/engine.md`` can be drawn from the page, and are there."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from PIL import Image
from serving import ROOT, Program

sys.path.insert(0, str(ROOT / "scripts"))
from make_gallery import CAPTION, PAGE, captions, repeated, sent, sheet, sheets, size

TEXT = PAGE.read_text("utf-8")
SHEETS = sheets(TEXT)


def test_every_picture_of_the_page_says_how_it_was_made() -> None:
    assert list(SHEETS) == re.findall(r"!\[[^\]]*\]\((.*?)\)", TEXT)
    assert len(SHEETS) >= 8


@pytest.mark.parametrize("path", SHEETS)
def test_a_sheet_is_small_and_has_a_place_for_each_request(path: str) -> None:
    file, bodies = PAGE.parent / path, SHEETS[path]
    assert file.stat().st_size < 300_000
    blank = [repeated(Image.new("RGB", size(body)), body) for body in bodies]
    with Image.open(file) as found:
        assert found.size == sheet(blank, captions(bodies)).size


@pytest.mark.parametrize("path", SHEETS)
def test_the_service_takes_the_requests_of_a_sheet(stub_server: Program, path: str) -> None:
    blank = [Image.new("RGB", size(body)) for body in SHEETS[path]]
    for body in SHEETS[path]:
        fields = sent(body, blank) | ({"model": "small"} if "model" in body else {})
        fields.pop("refiner_checkpoint", None)  # none of these models is there
        text = json.dumps(fields).replace("shapes-2x", "Lanczos")
        answer = stub_server.request("POST", f"/{body.get('kind', 'txt2img')}", json=json.loads(text))
        assert answer.status_code == 200, answer.text
        assert answer.json()["warnings"] == []


@pytest.mark.parametrize(
    ("bodies", "texts"),
    [
        ([{"seed": 1, "steps": 2}, {"seed": 1, "steps": 3}], ["2", "3"]),
        ([{"seed": 1}, {"seed": 2, "rng": "cpu"}], ["1", "2, cpu"]),
        ([{"prompt": "a" * 50}, {"prompt": "b"}], ["1", "b"]),
    ],
)
def test_a_picture_is_named_by_what_is_its_own(bodies: list[dict[str, Any]], texts: list[str]) -> None:
    assert captions(bodies) == texts


def test_pictures_of_two_sizes_keep_theirs() -> None:
    drawn = sheet([Image.new("RGB", (8, 8), "red"), Image.new("RGB", (16, 8), "blue")], ["a", "b"])
    assert drawn.size == (32, 8 + CAPTION)
    assert [drawn.getpixel((x, 0)) for x in (7, 8, 16, 31)] == [(255, 0, 0), (255,) * 3, (0, 0, 255), (0, 0, 255)]
