"""Files found by what texts tell of them."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from pathlib import Path

import pytest
from fake_models import LORA_KEYS, SD1_KEYS, checkpoint, diffusers_folder

from diffusion_api.catalog import hashes
from diffusion_api.catalog.finder import Finder
from diffusion_api.catalog.library import Library


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the models ``one``, ``two`` and ``folder``, and the LoRAs ``style`` and ``trained``."""
    own = tmp_path / "stable_diffusion"
    checkpoint(own / "models" / "one.safetensors", SD1_KEYS)
    checkpoint(own / "models" / "two.safetensors", SD1_KEYS | {"large": [2**18]})
    diffusers_folder(own / "models" / "folder")
    checkpoint(own / "loras" / "style.safetensors", LORA_KEYS)
    checkpoint(own / "loras" / "trained.safetensors", LORA_KEYS | {"more": [1]}, {"sshs_model_hash": "ab" * 32})
    return tmp_path


def new_finder(home: Path, patience: float = 60) -> Finder:
    return Finder(Library(home, home / "stable_diffusion" / "models"), patience=patience)


def digest(home: Path, name: str) -> str:
    return hashlib.sha256((home / "stable_diffusion" / name).read_bytes()).hexdigest()


def tensors(home: Path, name: str) -> str:
    data = (home / "stable_diffusion" / name).read_bytes()
    return hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()


def found(finder: Finder, kind: str, name: str, told: str | None) -> tuple[str | None, bool]:
    row, by_hash = finder.find(kind, name, told)  # type: ignore[arg-type]
    return row and row.name, by_hash


@pytest.mark.parametrize("name", ["one", "two", "folder", "unheard of"])
def test_a_hash_goes_before_any_name(home: Path, name: str) -> None:
    finder, whole = new_finder(home), digest(home, "models/one.safetensors")
    for told in (whole[:10], whole[:12].upper(), whole):
        assert found(finder, "model", name, told) == ("one", True)


@pytest.mark.parametrize("told", [None, "", "0123456789", "no hash", "01234", 65 * "0"])
def test_without_a_hash_that_is_there_the_name_tells(home: Path, told: str | None) -> None:
    finder = new_finder(home)
    assert found(finder, "model", "TWO", told) == ("two", False)
    assert found(finder, "model", "folder", told) == ("folder", False)
    assert found(finder, "model", "three", told) == (None, False)


def test_a_lora_has_a_hash_of_its_file_one_of_its_tensors_and_one_of_its_trainer(home: Path) -> None:
    for told in (digest(home, "loras/style.safetensors")[:10], tensors(home, "loras/style.safetensors")[:12]):
        assert found(new_finder(home), "lora", "another name", told) == ("style", True)
    assert found(new_finder(home), "lora", "style", "ab" * 6) == ("trained", True)


def test_the_hash_of_before_2023_is_known(home: Path) -> None:
    data = (home / "stable_diffusion" / "models" / "two.safetensors").read_bytes()
    old = hashlib.sha256(data[2**20 : 2**20 + 2**16]).hexdigest()[:8]
    assert found(new_finder(home), "model", "one", old) == ("two", True)


def test_a_small_file_has_no_hash_of_before_2023(home: Path) -> None:
    nothing = hashlib.sha256(b"").hexdigest()[:8]
    assert found(new_finder(home), "model", "one", nothing) == ("one", False)


def test_the_file_with_the_right_name_is_read_first_and_no_other_if_it_is_the_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, make = [], hashes._whole
    monkeypatch.setattr(hashes, "_whole", lambda path: read.append(path.name) or make(path))
    assert found(new_finder(home), "model", "two", digest(home, "models/two.safetensors")[:10]) == ("two", True)
    assert read == ["two.safetensors"]
    assert set(json.loads((home / "stable_diffusion" / ".hashes.json").read_text())) == {
        str(home / "stable_diffusion" / "models" / "two.safetensors")
    }


def test_who_asks_does_not_wait_for_a_large_folder_and_is_answered_later(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, make, told = threading.Event(), hashes._whole, digest(home, "models/two.safetensors")
    monkeypatch.setattr(hashes, "_whole", lambda path: make(path) if go.wait(60) else "")
    finder = new_finder(home, patience=0.1)
    before = threading.active_count()
    for _ in range(5):
        assert found(finder, "model", "folder", told) == ("folder", False)
    assert threading.active_count() <= before + 2  # one that goes through the files, one that reads
    go.set()
    until = time.monotonic() + 60
    while found(finder, "model", "folder", told) != ("two", True):
        assert time.monotonic() < until


def test_a_file_that_goes_away_is_no_error(home: Path) -> None:
    finder, gone = new_finder(home), home / "stable_diffusion" / "models" / "two.safetensors"
    assert found(finder, "model", "two", None) == ("two", False)
    gone.unlink()
    assert found(finder, "model", "folder", "0123456789") == ("folder", False)
