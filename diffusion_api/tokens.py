"""The tokens that a text has for CLIP, counted without a model: the words and parts of words that its text encoder reads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from diffusion_api import prompt

ENDS = ["<|startoftext|>", "<|endoftext|>"]
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""What is never joined with its neighbours (Radford et al. 2021, the reference tokenizer)."""


def tokens(text: str, folder: Path) -> list[str]:
    """The tokens of a prompt as texts, without the brackets and weights of its emphasis; each stretch that has a weight of its
    own is read alone. ``folder`` has the vocabulary and its merges.
    """
    reader = _reader(folder)
    pieces = (piece.text for section in prompt.emphasis(text) for piece in section)
    numbers = (number for piece in pieces for number in reader.encode(piece).ids)
    return [reader.decode([number], skip_special_tokens=False).removesuffix("</w>") for number in numbers]


@cache
def _reader(folder: Path) -> Tokenizer:
    vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    reader = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=ENDS[1]))
    reader.add_special_tokens(ENDS)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    reader.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    reader.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    reader.decoder = decoders.ByteLevel()
    return reader
