"""What the commands say of pictures: ``info``, ``test-metadata`` and ``reproduce``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serving import PATIENCE, ROOT, Program, environment, run

from diffusion_api import images, metadata

TEXT = "a „castle“, 猫\nNegative prompt: fog\nSteps: 20, Sampler: Euler a, Seed: 7, Version: DiffusionAPI v0.1.0"

IGNORED = [f"--ignore={folder}" for folder in ("tests", "diffusion_api", "benchmarks", "docs", "deploy")]


def written(path: Path, text: str | None) -> Path:
    path.write_bytes(images.encode(np.zeros((48, 64, 3), np.uint8), format="png", quality=85, infotext=text))
    return path


def test_a_picture_is_told_raw_and_taken_apart(tmp_path: Path) -> None:
    done = run("info", written(tmp_path / "castle.png", TEXT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'castle.png'}: png, 64x48\n\n{TEXT}\n\n")
    for line in ("  prompt: 'a „castle“, 猫'", "  negative_prompt: 'fog'", "  Steps: 20", "  Seed: 7"):
        assert f"\n{line}\n" in done.stdout


def test_a_picture_that_says_nothing_and_a_file_that_is_none_are_told_apart(tmp_path: Path) -> None:
    done = run("info", written(tmp_path / "castle.png", None), cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "There is no infotext in it.")
    (tmp_path / "notes.png").write_text("no picture")
    done = run("info", tmp_path / "notes.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"diffusion-api: {tmp_path / 'notes.png'}: not a picture")


def test_what_a_terminal_would_obey_is_taken_out(tmp_path: Path) -> None:
    said, _ = metadata.info(written(tmp_path / "castle.png", f"\x1b[2Ja \x07castle\n{TEXT}, Odd: \x9b31m"))
    assert not {letter for letter in said if not letter.isprintable()} - {"\n"}


def test_the_other_texts_of_a_picture_are_named(tmp_path: Path) -> None:
    texts = PngInfo()
    texts.add_text("workflow", "{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "comfy.png", pnginfo=texts)
    assert "  workflow: 2 characters" in metadata.info(tmp_path / "comfy.png")[0]


def test_every_format_is_written_and_read_back_by_the_tool(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "test_metadata.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("read back as written") == 5
    for suffix in ("png", "jpg", "webp", "avif", "gif"):
        text = images.read_infotext((tmp_path / f"test_image_with_metadata.{suffix}").read_bytes())
        assert text == metadata.SAMPLE
    assert "  LoRAs: anime_style:0.8, detail_enhancer:0.6\n" in done.stdout
    assert "  Model: v1-5-pruned-emaonly\n" in done.stdout


def test_a_format_that_loses_the_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "SAMPLE", "a" * 40_000 + metadata.SAMPLE)
    said, well = metadata.test(tmp_path)
    assert not well
    assert "✗ test_image_with_metadata.jpg: NOT read back" in said


def test_the_tools_of_the_root_are_no_tests() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", ".", *IGNORED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "no tests collected" in done.stdout, done.stdout


def test_the_commands_of_the_manual_run(stub_server: Program, tmp_path: Path) -> None:
    made = stub_server.result(prompt="a castle", model="small", steps=2, seed=7, fileType="png")
    (tmp_path / "picture.png").write_bytes((stub_server.home / made["output_path"]).read_bytes())
    program = {"python ": f"{sys.executable} {ROOT}/", "diffusion-api ": f"{sys.executable} -m diffusion_api "}
    commands = re.findall(r"```bash\n(.*?)\n```", (ROOT / "METADATA_README.md").read_text("utf-8"), re.DOTALL)
    assert len(commands) == 3
    for line in commands:
        for name, here in program.items():
            line = line.replace(name, here) if line.startswith(name) else line
        done = subprocess.run(
            line,
            shell=True,
            cwd=tmp_path,
            env=environment(url=stub_server.url),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the pixels are the same\n")


def test_a_picture_is_made_again_and_compared(stub_server: Program, tmp_path: Path) -> None:
    made = stub_server.result(prompt="a castle", model="small", steps=2, seed=7, fileType="png")
    first = stub_server.home / made["output_path"]
    done = run("reproduce", first, "--output", tmp_path / "again.png", cwd=tmp_path, url=stub_server.url)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'again.png'}\nthe pixels are the same\n"), done.stderr
    text = images.read_infotext(first.read_bytes()) or ""
    (tmp_path / "other.png").write_bytes(
        images.encode(np.zeros((64, 64, 3), np.uint8), format="png", quality=85, infotext=text)
    )
    done = run("reproduce", tmp_path / "other.png", cwd=tmp_path, url=stub_server.url)
    assert done.returncode == 1
    assert "not the same: " in done.stdout


def test_what_is_lost_in_a_jpeg_is_no_failure(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    (tmp_path / "one.jpg").write_bytes(images.encode(pixels, format="jpeg", quality=85, infotext=None))
    (tmp_path / "two.png").write_bytes(images.encode(pixels, format="png", quality=85, infotext=None))
    said, well = metadata.compared(tmp_path / "one.jpg", tmp_path / "two.png")
    assert well
    assert "a jpeg loses something" in said
    said, well = metadata.compared(written(tmp_path / "black.png", None), tmp_path / "two.png")
    assert (said.startswith("not the same: "), well) == (True, False)
