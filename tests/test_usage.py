"""What folders take on the disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from diffusion_api import usage
from diffusion_api.usage import Usage, Use


def test_it_counts_what_du_counts(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "b" / "c").mkdir(parents=True)
    for n, size in enumerate((0, 1, 5000, 100_000)):
        (folder / "b" / f"{n}").write_bytes(b"x" * size)
    (folder / "b" / "c" / "deep").write_bytes(b"x" * 10_000)
    expected = subprocess.run(
        f"find {folder} -type f -print0 | du --files0-from=- -B1 -c | tail -1",
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = Usage({"a": folder, "nowhere": tmp_path / "nowhere"}).now()
    assert found == {"a": Use(bytes=int(expected.stdout.split()[0]), files=5), "nowhere": Use(bytes=0, files=0)}


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "large").write_bytes(b"x" * 10_000)
    folder = tmp_path / "near"
    folder.mkdir()
    (folder / "folder").symlink_to(tmp_path / "far")
    (folder / "file").symlink_to(tmp_path / "far" / "large")
    assert Usage({"near": folder}).now() == {"near": Use(bytes=0, files=0)}


def test_it_counts_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Usage({"a": tmp_path})
    assert kept.now()["a"].files == 0
    (tmp_path / "new").touch()
    assert kept.now()["a"].files == 0
    monkeypatch.setattr(usage, "COUNT_EVERY", 0)
    assert Usage({"a": tmp_path}).now()["a"].files == 1
