"""``make audit``: known holes in the locked packages, as PyPI's advisory service knows them.

pip-audit alone ends well when it could ask about nothing. Exit status here: 0 for "asked about all, none known", 1 for
holes, 2 when at least one package could not be asked about.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

LOCK = "requirements.txt"
CLEAN, HOLES, UNKNOWN = 0, 1, 2


def main() -> int:
    """Ask, and say what came of it."""
    program = Path(sysconfig.get_path("scripts")) / "pip-audit"
    command = [program, "--requirement", LOCK, "--disable-pip", "--require-hashes", "--progress-spinner", "off"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        print(f"NOTHING WAS CHECKED: the advisory service could not be asked: {reason}")
        return UNKNOWN
    status, lines = verdict(report)
    print("\n".join(lines))
    return status


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """The exit status and what to print, from pip-audit's report."""
    packages = report["dependencies"]
    skipped = [package for package in packages if "skip_reason" in package]
    lines = [
        f"{package['name']} {package['version']}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'no version'}"
        for package in packages
        for hole in package.get("vulns", ())
    ]
    status = HOLES if lines else UNKNOWN if skipped or not packages else CLEAN
    checked = len(packages) - len(skipped)
    lines.append(f"{checked} of {len(packages)} packages of {LOCK} were checked")
    if skipped or not packages:
        lines.append("NOT CHECKED: " + (", ".join(package["name"] for package in skipped) or "anything"))
        lines.append("the advisory service has nothing on these here; ask again where PyPI itself can be reached")
    return status, lines


if __name__ == "__main__":
    sys.exit(main())
