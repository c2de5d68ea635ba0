"""How long until the service answers: import of the app above FastAPI's own, and process start to ``GET /hello``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from results import write

RUNS = 7


def main() -> None:
    fastapi, app, torch_free = [], [], True
    for _ in range(RUNS):
        fastapi.append(_python("import time; t = time.perf_counter(); import fastapi; print(time.perf_counter() - t)"))
        app.append(
            _python("import time; t = time.perf_counter(); import diffusion_api.app; print(time.perf_counter() - t)")
        )
    torch_free = _python("import diffusion_api.app, sys; print(int('torch' in sys.modules))") == 0
    hello = [_hello() for _ in range(RUNS)]
    extra = statistics.median(a - f for a, f in zip(app, fastapi, strict=True))
    write(
        "startup",
        {
            "import_above_fastapi_ms": round(1000 * extra, 1),
            "import_fastapi_ms": round(1000 * statistics.median(fastapi), 1),
            "import_leaves_torch_out": torch_free,
            "hello_seconds_median": round(statistics.median(hello), 3),
            "hello_seconds_worst": round(max(hello), 3),
        },
    )


def _python(code: str) -> float:
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def _hello() -> float:
    """Seconds from process start to the first answer, with the real engine loading torch in the background."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "diffusion_api", "serve", "--port", "0", "--home", home]
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert child.stdout
            url = child.stdout.readline().split()[3]
            urllib.request.urlopen(f"{url}/hello").read()
            return time.perf_counter() - began
        finally:
            child.kill()
            child.wait()


if __name__ == "__main__":
    main()
