"""What is beyond the limits, and what time it is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from diffusion_api.retention import Clock, Entry, Limits, due, entries


def names(limits: Limits, *kept: Entry, now: float = 1000) -> str:
    return "".join(entry.name for entry in due(kept, limits, now=now, what="things"))


KEPT = Entry("b", 200, 20), Entry("d", 400, 40), Entry("a", 100, 10), Entry("c", 300, 30)


@pytest.mark.parametrize(
    ("limits", "beyond"),
    [
        (Limits(), ""),
        (Limits(seconds=700), "ab"),
        (Limits(seconds=0), "abcd"),
        (Limits(count=3), "a"),
        (Limits(count=0), "abcd"),
        (Limits(size=90), "a"),
        (Limits(size=69), "abc"),
        (Limits(size=39), "abcd"),
        (Limits(seconds=850, count=3, size=1000), "a"),
        (Limits(seconds=850, count=1, size=90), "abc"),
    ],
    ids=str,
)
def test_what_is_beyond_a_limit_is_due_the_oldest_first(limits: Limits, beyond: str) -> None:
    assert names(limits, *KEPT) == beyond


def test_what_comes_from_the_future_is_new() -> None:
    assert names(Limits(seconds=0), *KEPT, now=50) == ""
    assert names(Limits(count=1), *KEPT, now=50) == "abc"


def test_only_regular_files_are_listed(tmp_path: Path) -> None:
    for name in ("one.json", "two.txt"):
        (tmp_path / name).write_text("12345")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "one.json")
    (found,) = entries(tmp_path, ".json")
    assert (found.name, found.size) == ("one.json", 5)
    assert found.since == (tmp_path / "one.json").stat().st_mtime
    assert {entry.name for entry in entries(tmp_path)} == {"one.json", "two.txt"}
    assert entries(tmp_path / "nowhere") == []


def test_the_clock_goes_with_the_time_but_never_leaps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, passed = time.time(), 0.0
    began = time.clock_gettime(time.CLOCK_MONOTONIC)
    monkeypatch.setattr(time, "time", lambda: wall + passed)
    monkeypatch.setattr(time, "clock_gettime", lambda _: began + passed)
    clock = Clock()
    assert clock.now() == pytest.approx(wall)
    passed = 3600
    assert clock.now() == pytest.approx(wall + 3600)
    monkeypatch.setattr(time, "time", lambda: wall + passed + 7200)
    assert clock.now() == pytest.approx(wall + 3600)
    monkeypatch.setattr(time, "time", lambda: wall + passed - 7200)
    assert clock.now() == pytest.approx(wall - 3600)
    passed = 7200
    assert clock.now() == pytest.approx(wall)
