"""CLIPTokenizers whose vocabulary and merges are a subset of CLIP's own."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

from demo_models.scenes import COLOURS, FILLERS, SHAPES, SIDE_PHRASES, SIZE_WORDS

Tables = tuple[list[str], list[tuple[str, str]]]
"""A vocabulary in the order of its ids, and merges in the order of their rank."""


def clip_tables(path: Path) -> Tables:
    """CLIP's vocabulary in id order and its merges in rank order, from the published ``bpe_simple_vocab_16e6.txt.gz``."""
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(c) for c in printable]
    symbols += [chr(256 + i) for i in range(256 - len(printable))]
    vocabulary = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
    return [*vocabulary, "<|startoftext|>", "<|endoftext|>"], merges  # type: ignore[return-value]


def subset_tables(vocabulary: list[str], merges: list[tuple[str, str]], words: set[str]) -> Tables:
    """The part of CLIP's tables that ``words`` need: they split exactly as with the whole, others fall into letters."""
    rank = {pair: i for i, pair in enumerate(merges)}
    used: set[tuple[str, str]] = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while pairs := [p for p in pairwise(parts) if p in rank]:
            best = min(pairs, key=rank.__getitem__)
            used.add(best)
            merged: list[str] = []
            while parts:
                if len(parts) > 1 and (parts[0], parts[1]) == best:
                    merged.append("".join(best))
                    parts = parts[2:]
                else:
                    merged.append(parts.pop(0))
            parts = merged
    kept = sorted(used, key=rank.__getitem__)
    return [*vocabulary[:512], *("".join(m) for m in kept), *vocabulary[-2:]], kept


def caption_words() -> set[str]:
    words = {*COLOURS, *SHAPES, *FILLERS, *",.", "a", "an", "on", "with", "and", "background"}
    for phrases in (*SIZE_WORDS.values(), *SIDE_PHRASES.values()):
        words.update(w for p in phrases for w in p.split())
    return {w for w in words if not any(c.isdigit() for c in w)}


def save_tokenizer(folder: Path, tables: Tables, padding: str) -> None:
    """Write a CLIPTokenizer's files; texts shorter than 77 tokens are filled up with ``padding``."""
    vocabulary, merges = tables
    folder.mkdir(parents=True, exist_ok=True)
    table = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token=padding)
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
