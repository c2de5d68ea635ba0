"""Prompts as chunks of 75 tokens, with CLIP's own tokenizer as the package ships it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from diffusion_api.engine import text
from diffusion_api.engine.text import Conditioning, Encoded, Words
from diffusion_api.settings import DATA

START, END = 49406, 49407


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DATA / "clip", local_files_only=True)


def test_the_shipped_vocabulary_has_clips_ids(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer("a photo of a cat").input_ids == [START, 320, 1125, 539, 320, 2368, END]


@pytest.fixture
def seen() -> list[Tensor]:
    """The ids that the encoder of ``words`` got."""
    return []


@pytest.fixture
def words(tokenizer: CLIPTokenizer, seen: list[Tensor]) -> Words:
    """With an encoder that returns the ids themselves, and twice that as a second number."""

    def encoder(ids: Tensor, clip_skip: int) -> Encoded:
        seen.append(ids)
        return Encoded(torch.stack([ids, ids * 2], -1).float() * clip_skip, ids)

    return Words(tokenizer, encoder, torch.nn.Embedding(END + 1, 2))


def tokens(words: Words, prompt: str) -> list[list[int]]:
    """Of each chunk, without what stands around them."""
    return [list(chunk.ids[1 : chunk.ids.index(END)]) for chunk in words.chunks(prompt)]


def test_a_short_prompt_is_one_padded_chunk(words: Words) -> None:
    (chunk,) = words.chunks("a cat")
    assert chunk.ids == (START, 320, 2368, *[END] * 74)
    assert chunk.weights == (1,) * 77


def test_an_empty_prompt_is_one_chunk(words: Words) -> None:
    assert [chunk.ids for chunk in words.chunks("")] == [(START, *[END] * 76)]


@pytest.mark.parametrize(("count", "chunks"), [(75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_long_prompt_loses_no_token(words: Words, count: int, chunks: int) -> None:
    assert [len(row) for row in tokens(words, "cat " * count)] == [75] * (chunks - 1) + [count - 75 * (chunks - 1)]
    assert all(len(chunk.ids) == 77 for chunk in words.chunks("cat " * count))


@pytest.mark.parametrize(
    ("before", "after", "lengths"),
    [(55, 30, [56, 30]), (54, 30, [75, 10]), (74, 5, [75, 5]), (75, 5, [75, 6]), (60, 14, [75]), (60, 15, [61, 15])],
)
def test_what_follows_a_comma_near_the_end_moves_to_the_next_chunk(
    words: Words, before: int, after: int, lengths: list[int]
) -> None:
    assert [len(row) for row in tokens(words, "cat " * before + "," + " dog" * after)] == lengths


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [("a BREAK cat", [1, 1]), ("BREAK a", [0, 1]), ("a BREAK", [1]), ("a BREAK BREAK b", [1, 0, 1]), ("BREAK", [0])],
)
def test_break_begins_a_chunk(words: Words, prompt: str, lengths: list[int]) -> None:
    assert [len(row) for row in tokens(words, prompt)] == lengths


def test_each_token_has_the_weight_of_its_words(words: Words) -> None:
    (chunk,) = words.chunks("a (black cat:1.5) [dog]")
    assert chunk.weights == (1, 1, 1.5, 1.5, 1 / 1.1, *[1] * 72)


def test_conditionings_are_as_long_as_the_longest_and_each_chunk_is_encoded_alone(
    words: Words, seen: list[Tensor]
) -> None:
    short, long = words.encode(("", "cat " * 80))
    assert short.shape == long.shape == (1, 154, 2)
    assert all(ids.shape == (1, 77) for ids in seen)
    assert torch.equal(short[0, 77:, 0], torch.tensor([START, *[END] * 76]).float())


@pytest.mark.parametrize("prompt", ["a cat, a dog", "nice " * 200, "", r"a \(cat\)", "(a cat:1.0)"])
def test_a_prompt_without_weights_is_what_the_encoder_says(words: Words, prompt: str) -> None:
    (conditioning,) = words.encode((prompt,))
    plain = torch.tensor([[token for chunk in words.chunks(prompt) for token in chunk.ids]])
    assert torch.equal(conditioning, torch.stack([plain, plain * 2], -1).float())


def test_weights_multiply_and_the_mean_of_the_chunk_is_restored(words: Words) -> None:
    plain, weighed = (words.encode((prompt,))[0] for prompt in ("a cat", "a (cat:1.5)"))
    assert weighed.mean().item() == pytest.approx(plain.mean().item())
    relative = weighed / plain
    assert relative[0, 2] / relative[0, 1] == pytest.approx(1.5)
    assert torch.allclose(relative[0, 3:], relative[0, 1].expand(74, 2))


def test_without_norm_weights_only_multiply(words: Words) -> None:
    (plain,), (weighed,) = words.encode(("a cat",)), words.encode(("a (cat:1.5)",), mode="no norm")
    expected = plain.clone()
    expected[0, 2] *= 1.5
    assert torch.equal(weighed, expected)


def test_ignored_weights_do_nothing_and_breaks_still_break(words: Words) -> None:
    (ignored,) = words.encode(("a (cat:1.5) BREAK [dog]",), mode="ignore")
    assert torch.equal(ignored, words.encode(("a cat BREAK dog",))[0])


def test_without_emphasis_brackets_and_breaks_are_words(words: Words) -> None:
    (literal,) = words.encode(("a (cat:1.5) BREAK",), mode="none")
    assert torch.equal(literal, words.encode((r"a \(cat:1.5\) BREA\K",))[0])


def test_a_chunk_is_encoded_once_for_each_clip_skip(words: Words, seen: list[Tensor]) -> None:
    one, two = (words.encode(("a cat",), clip_skip=skip)[0] for skip in (1, 2))
    assert torch.equal(two, one * 2)
    assert torch.equal(words.encode(("a cat",), clip_skip=2)[0], two)
    assert len(seen) == 2


def test_the_mean_is_restored_over_all_texts_of_a_schedule(words: Words) -> None:
    texts = ("a (cat:1.5)", "a dog", "a dog")
    together, plain = words.encode(texts), words.encode(("a cat", "a dog", "a dog"))
    assert torch.stack(together).mean().item() == pytest.approx(torch.stack(plain).mean().item())
    assert together[1] is together[2]
    assert not torch.equal(together[1], plain[1])


def test_a_chunk_is_encoded_once(words: Words, seen: list[Tensor]) -> None:
    words.encode(("a cat BREAK a dog", "a (dog:1.2)"))
    assert len(seen) == 3
    words.encode(("a (cat:2) BREAK a dog", ""))
    assert len(seen) == 3


def test_a_text_is_cut_once_for_each_way_to_read_it(words: Words) -> None:
    read, literal = words.chunks("(a cat:1.5)"), words.chunks("(a cat:1.5)", "none")
    assert words.chunks("(a cat:1.5)") is read
    assert words.chunks("(a cat:1.5)", "no norm") is read
    assert words.chunks("(a cat:1.5)", "none") is literal
    assert read != literal


def test_only_the_last_chunks_are_kept(words: Words, seen: list[Tensor]) -> None:
    for number in range(text.KEPT + 1):
        words.encode((f"cat {number}",))
    words.encode(("cat 1",))
    assert len(seen) == text.KEPT + 1
    words.encode(("cat 0",))
    assert len(seen) == text.KEPT + 2


def test_shorter_prompts_repeat_their_last_vector() -> None:
    short, long = Conditioning(torch.arange(4.0).reshape(1, 2, 2), negative=True), Conditioning(torch.zeros(1, 3, 2))
    longer, same = text.as_long([short, long])
    assert longer.hidden[0].tolist() == [[0, 1], [2, 3], [2, 3]]
    assert longer.negative
    assert same.hidden is long.hidden


def test_what_a_text_is_as_a_whole_is_that_of_its_first_chunk(words: Words, seen: list[Tensor]) -> None:
    words.encode(("a (cat:1.5) BREAK a dog",))
    pooled = words.pooled("a (cat:1.5) BREAK a dog")
    assert pooled is not None
    assert pooled.tolist() == [list(words.chunks("a cat")[0].ids)]
    assert len(seen) == 2
