"""Draw the contact sheets of ``docs/engine.md`` with a running service.

    make serve
    python scripts/make_gallery.py http://127.0.0.1:8000 [name of a sheet ...]

The page is the recipe: the block of JSON after a picture has the bodies that it is drawn from, one a line, each with what
differs from the first one. ``"sampler_name": "*"`` stands for every sampler of the catalog. A body of another ``kind`` than
txt2img begins with a picture of the sheet, ``image``, counted from 1; its ``mask`` is the box that is white, in pixels: left,
top, right, bottom. ``repeat`` lays the picture side by side with itself.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from diffusion_api.catalog import samplers
from diffusion_api.client import Client

PAGE = Path(__file__).parents[1] / "docs" / "engine.md"
SHEET = re.compile(r"!\[[^\]]*\]\((images/[\w-]+\.png)\)\n\n```json\n(.*?)```", re.DOTALL)
COLUMNS = 6
CAPTION = 14
"""Pixels below each picture."""

LONGEST = 21
"""Characters that fit there."""

OWN = ("kind", "image", "mask", "repeat", "width", "height")
"""Keys of which no caption speaks."""

Body = dict[str, Any]


def sheets(page: str) -> dict[str, list[Body]]:
    """The bodies of each picture of the page, by the path of its file."""
    return {
        path: list(_bodies([json.loads(line) for line in lines.splitlines()])) for path, lines in SHEET.findall(page)
    }


def _bodies(lines: list[Body]) -> Iterator[Body]:
    for line in lines:
        body = line if line.get("kind") == "upscale" else lines[0] | line
        if body.get("sampler_name") == "*":
            yield from (body | {"sampler_name": row.label} for row in samplers.SAMPLERS)
        else:
            yield body


def captions(bodies: list[Body]) -> list[str]:
    """For each picture the values in which the bodies differ, or its number where that is too long."""
    keys = [key for key in dict.fromkeys(key for body in bodies for key in body) if _differ(bodies, key)]
    texts = (", ".join(str(body[key]) for key in keys if key in body and key not in OWN) for body in bodies)
    return [text if text and len(text) <= LONGEST else str(number) for number, text in enumerate(texts, 1)]


def _differ(bodies: list[Body], key: str) -> bool:
    return len({str(body.get(key)) for body in bodies}) > 1


def main() -> None:
    url, *names = sys.argv[1:]
    with Client(url) as client:
        for path, bodies in sheets(PAGE.read_text("utf-8")).items():
            if not names or Path(path).stem in names:
                pictures: list[Image.Image] = []
                for body in bodies:
                    pictures.append(_drawn(client, body, pictures))
                pictures = [repeated(picture, body) for picture, body in zip(pictures, bodies, strict=True)]
                file = PAGE.parent / path
                sheet(pictures, captions(bodies)).quantize(256).save(file, optimize=True)
                print(f"{path}: {len(pictures)} pictures, {file.stat().st_size / 1024:.0f} KiB")


def _drawn(client: Client, body: Body, before: list[Image.Image]) -> Image.Image:
    status = client.wait(client.submit(body.get("kind", "txt2img"), sent(body, before)).job_id)
    encoded = status.get("image")
    if not encoded or status.get("warnings"):
        raise SystemExit(f"{body}: {status.get('error')}, {status.get('warnings')}")
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def sent(body: Body, before: list[Image.Image]) -> Body:
    """What is posted for a body of the page, given the pictures that stand before it."""
    fields = {key: value for key, value in body.items() if key not in ("kind", "repeat")} | {"fileType": "png"}
    if "image" in fields:
        picture = before[body["image"] - 1]
        fields["image"] = _base64(picture)
        if "mask" in fields:
            mask = Image.new("L", picture.size)
            mask.paste(255, tuple(body["mask"]))
            fields["mask"] = _base64(mask)
    return fields


def _base64(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def size(body: Body) -> tuple[int, int]:
    """Width and height of the picture of a body."""
    last = body.get("hires") or body
    return last["width"], last["height"]


def repeated(picture: Image.Image, body: Body) -> Image.Image:
    """The picture, side by side with itself as often as the body says."""
    times = body.get("repeat", 1)
    found = Image.new("RGB", (picture.width * times, picture.height))
    for number in range(times):
        found.paste(picture, (number * picture.width, 0))
    return found


def sheet(pictures: list[Image.Image], texts: list[str]) -> Image.Image:
    """The pictures in rows, each with its text below."""
    width, height = (max(picture.size[side] for picture in pictures) for side in (0, 1))
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    found = Image.new("RGB", (columns * width, rows * (height + CAPTION)), "white")
    pen = ImageDraw.Draw(found)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = number % columns * width, number // columns * (height + CAPTION)
        found.paste(picture, (left, top))
        pen.text((left + 2, top + height), text, fill="black")
    return found


if __name__ == "__main__":
    main()
