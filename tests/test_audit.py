"""``make audit`` never passes in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from audit import CLEAN, HOLES, UNKNOWN, verdict

SOUND: dict[str, Any] = {"name": "one", "version": "1.0", "vulns": []}
HOLED: dict[str, Any] = {"name": "two", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
SKIPPED: dict[str, Any] = {"name": "three", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ([SOUND], CLEAN, ["1 of 1 packages"]),
        ([SOUND, HOLED], HOLES, ["two 2.0: CVE-1, fixed in 2.1", "2 of 2 packages"]),
        ([SOUND, SKIPPED], UNKNOWN, ["1 of 2 packages", "NOT CHECKED: three"]),
        ([HOLED, SKIPPED], HOLES, ["CVE-1", "NOT CHECKED: three"]),
        ([], UNKNOWN, ["0 of 0 packages", "NOT CHECKED: anything"]),
    ],
)
def test_what_was_not_checked_is_no_success(packages: list[dict[str, Any]], status: int, words: list[str]) -> None:
    found, lines = verdict({"dependencies": packages})
    assert found == status
    assert [word for word in words if word not in "\n".join(lines)] == []


def test_without_a_network_nothing_is_checked_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(f"six==1.17.0 --hash=sha256:{'0' * 64}\n")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "audit.py"],
        cwd=tmp_path,
        env=os.environ | nowhere | {"no_proxy": "", "NO_PROXY": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == UNKNOWN, done.stdout
    assert done.stdout.startswith("NOTHING WAS CHECKED: the advisory service could not be asked: ")
