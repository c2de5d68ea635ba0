"""The counts of ``make chaos``: kept in ``benchmarks/results/chaos.json``, shown in docs/reliability.md."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

from serving import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- counts -->\n", "<!-- /counts -->"

Counts = dict[str, dict[str, Any]]


def keep(run: str, **counts: object) -> None:
    """Write down, and print, what a run counted; what was counted under other names stays."""
    kept = counts_kept()
    kept[run] = kept.get(run, {}) | {"date": date.today().isoformat(), **counts}
    RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")
    page = PAGE.read_text("utf-8")
    PAGE.write_text(page.replace(f"{BEGIN}{shown(page)}{END}", f"{BEGIN}{table(kept)}{END}"), "utf-8")
    print(run, counts)


def counts_kept() -> Counts:
    """What was counted so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def shown(page: str) -> str:
    """What the page says of the counts."""
    return page.partition(BEGIN)[2].partition(END)[0]


def table(kept: Counts) -> str:
    """What the page is to say of them."""
    rows = ["", "| run | counted | on |", "|---|---|---|"]
    for run, counts in sorted(kept.items()):
        told = "; ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items() if name != "date")
        rows.append(f"| {run} | {told} | {counts['date']} |".replace("_", r"\_"))
    return "\n".join([*rows, "", ""])
