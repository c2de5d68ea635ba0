"""Hashes of files, made once."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_models import LORA_KEYS, SD1_KEYS, checkpoint

from diffusion_api.catalog import hashes
from diffusion_api.catalog.hashes import Hashes
from diffusion_api.catalog.library import Library


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that were read for a hash."""
    names: list[str] = []
    make = hashes._whole
    monkeypatch.setattr(hashes, "_whole", lambda path: names.append(path.name) or make(path))
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "one.safetensors", SD1_KEYS)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_hash_is_made_once_also_over_a_restart(tmp_path: Path, file: Path, made: list[str]) -> None:
    kept = tmp_path / "hashes.json"
    for _ in range(2):
        known = Hashes(kept)
        assert [known.whole(file).result() for _ in range(3)] == [digest(file)] * 3
    assert made == ["one.safetensors"]


def test_a_file_that_was_changed_is_hashed_again(tmp_path: Path, file: Path, made: list[str]) -> None:
    known = Hashes(tmp_path / "hashes.json")
    first = known.whole(file).result()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    os.utime(file, ns=(1, 1))
    assert known.whole(file).result() == digest(file) != first
    assert len(made) == 2


def test_many_who_ask_at_once_wait_for_one(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, calls = threading.Event(), []
    monkeypatch.setattr(hashes, "_whole", lambda path: calls.append(path) or str(go.wait(60)))
    known = Hashes()
    futures = [known.whole(file) for _ in range(9)]
    assert not any(future.done() for future in futures)
    go.set()
    assert [future.result() for future in futures] == ["True"] * 9
    assert len(calls) == 1


def test_two_processes_keep_what_the_other_has(tmp_path: Path, file: Path, made: list[str]) -> None:
    other = checkpoint(tmp_path / "two.safetensors", LORA_KEYS)
    kept = tmp_path / "hashes.json"
    one, two = Hashes(kept), Hashes(kept)
    one.whole(file).result()
    two.whole(other).result()
    third = Hashes(kept)
    assert (third.whole(file).result(), third.whole(other).result()) == (digest(file), digest(other))
    assert made == ["one.safetensors", "two.safetensors"]


def test_files_that_are_gone_are_forgotten(tmp_path: Path, file: Path) -> None:
    other = checkpoint(tmp_path / "two.safetensors", LORA_KEYS)
    kept = tmp_path / "hashes.json"
    Hashes(kept).whole(file).result()
    file.unlink()
    Hashes(kept).tensors(other).result()
    assert list(json.loads(kept.read_text())) == [f"{other}#tensors"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3}', '{"x": [1, 2]}'])
def test_a_broken_record_of_hashes_is_made_anew(tmp_path: Path, file: Path, content: str) -> None:
    kept = tmp_path / "hashes.json"
    kept.write_text(content)
    assert Hashes(kept).whole(file).result() == digest(file)
    assert list(json.loads(kept.read_text())) == [str(file)]


def test_where_nothing_can_be_kept_hashes_are_made_all_the_same(tmp_path: Path, file: Path) -> None:
    assert Hashes(tmp_path / "nowhere" / "hashes.json").whole(file).result() == digest(file)
    (tmp_path / "folder").mkdir()
    assert Hashes(tmp_path / "folder").whole(file).result() == digest(file)


def test_a_file_that_is_gone_has_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Hashes().whole(tmp_path / "gone").result()


def test_the_hash_of_tensors_leaves_out_the_header(tmp_path: Path, file: Path) -> None:
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert Hashes().tensors(file).result() == hashlib.sha256(file.read_bytes()[8 + length :]).hexdigest()


def test_the_library_keeps_them_in_the_home(tmp_path: Path, made: list[str]) -> None:
    path = checkpoint(tmp_path / "stable_diffusion" / "models" / "one.safetensors", SD1_KEYS)
    for _ in range(2):
        (model,) = Library(tmp_path, path.parent).models()
        assert model.hash == digest(path)[:10]
    assert made == ["one.safetensors"]
    assert list(json.loads((tmp_path / "stable_diffusion" / ".hashes.json").read_text())) == [str(path)]


def test_a_model_whose_file_is_gone_has_no_hash_and_no_error(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "stable_diffusion" / "models" / "one.safetensors", SD1_KEYS)
    (model,) = Library(tmp_path, path.parent).models()
    path.unlink()
    assert model.hash is None
