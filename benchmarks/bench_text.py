"""What a prompt costs before the first step: read and encoded by a text encoder of CLIP's size, and when it comes again.

And what prompts cost to read that are nothing but brackets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from results import write
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_api.engine.families.base import read_tokenizer
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.engine.text import Words
from diffusion_api.prompt import emphasis, parse
from diffusion_api.settings import DATA

RUNS = 100
PROMPT = (
    "masterpiece, (best quality:1.2), a lighthouse on a cliff above a (stormy:1.3) sea, [crashing waves], dramatic clouds, "
    "((rim light)), volumetric fog, gulls, wet rocks, oil painting, (thick brush strokes:0.8), by a master of the genre"
)
NEGATIVE = (
    "blurry, (low quality:1.4), jpeg artifacts, watermark, signature, text, cropped, (worst quality:1.4), frame, border"
)


def main() -> None:
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    model = CLIPTextModel(config).eval()  # of the size of Stable Diffusion 1.x's; its weights do not matter
    words = Words(read_tokenizer(DATA / "clip"), partial(SD1.read_words, model), model.get_input_embeddings())

    def encode() -> None:
        words.encode((PROMPT,))
        words.encode((NEGATIVE,))

    def encode_anew() -> None:
        words.forget()
        encode()

    with torch.inference_mode():
        first, again = _median(encode_anew, 5), _median(encode, RUNS)
    write(
        "text",
        {
            "first_ms": round(1000 * first, 1),
            "again_ms": round(1000 * again, 3),
            "brackets_2000_ms": round(1000 * _median(partial(_read, "(" * 2000 + "a" + ")" * 2000), RUNS), 1),
            "groups_500_ms": round(1000 * _median(partial(_read, "(a:1.3) " * 500), RUNS), 1),
            "characters": len(PROMPT) + len(NEGATIVE),
            "threads": torch.get_num_threads(),
        },
    )


def _read(prompt: str) -> None:
    for part in parse(prompt).parts:
        for _, text in part.schedule(20):
            emphasis(text)


def _median(work: Callable[[], None], runs: int) -> float:
    """Seconds; the first run warms up and does not count."""
    work()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
