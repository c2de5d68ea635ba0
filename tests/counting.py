"""The counts of ``make chaos``, in ``benchmarks/results/chaos.json``, which docs/reliability.md quotes."""

from __future__ import annotations

import json
from datetime import date

from serving import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"


def keep(run: str, **counts: object) -> None:
    """Write down, and print, what a run counted; what was counted under other names stays."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[run] = kept.get(run, {}) | {"date": date.today().isoformat(), **counts}
    RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")
    print(run, counts)
