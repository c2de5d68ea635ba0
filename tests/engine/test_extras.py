"""Embeddings and VAE files, by the pictures they make with the shipped model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import lora_zoo
import numpy as np
import pytest
import torch
import zoo
from asking import Draw, finished, from_picture, hires, request
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from semantics import asked, seen
from torch import Tensor

from diffusion_api.canvas import LANCZOS
from diffusion_api.catalog import library
from diffusion_api.engine.embeddings import read_embedding
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.families.base import read_tokenizer
from diffusion_api.settings import DATA

SHAPES = DATA / "models" / "shapes"
SMALL = dict(steps=2, width=64, height=64)


@pytest.fixture(autouse=True)
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test puts down are seen by the next job."""
    monkeypatch.setattr(library, "FRESH", 0.0)
    monkeypatch.setattr(library, "LONG_SCAN", 0)


@pytest.fixture
def put(models_dir: Path) -> Iterator[Callable[[str], Path]]:
    """``put("vae/x.safetensors")`` → where such a file of the shared engine's user is; it is taken away afterwards."""
    files: list[Path] = []

    def path(name: str) -> Path:
        file = models_dir.parent / "stable_diffusion" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        files.append(file)
        return file

    yield path
    for file in files:
        file.unlink()


@pytest.fixture(scope="module")
def vector() -> Callable[[str], Tensor]:
    """The shipped model's own vector of a word."""
    tokenizer = read_tokenizer(SHAPES / "tokenizer")
    (table,) = (t for n, t in load_file(SHAPES / "text_encoder" / "model.safetensors").items() if "token_emb" in n)
    return lambda word: table[tokenizer(word, add_special_tokens=False).input_ids].float()


def drawn(executor: Executor, prompt: str, **changes: object) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    done = finished(executor, request(prompt, **SMALL | changes))
    return done.images[0], done.warnings


@pytest.mark.parametrize("kind", zoo.EMBEDDINGS)
def test_an_embedding_is_worth_the_words_whose_vectors_it_holds(
    executor: Executor, put: Callable[[str], Path], vector: Callable[[str], Tensor], kind: str
) -> None:
    zoo.EMBEDDINGS[kind](put(f"embeddings/zorb{kind.split()[0]}"), torch.cat([vector("large"), vector("red")]))
    words = drawn(executor, "a large red circle on a white background", negative_prompt="large red")
    learned = drawn(executor, "a Zorb circle on a white background", negative_prompt="zorb")
    assert np.array_equal(words[0], learned[0])
    assert learned[1] == ()


def test_an_embedding_gone_its_name_is_a_word_again(
    executor: Executor, put: Callable[[str], Path], vector: Callable[[str], Tensor]
) -> None:
    before = drawn(executor, "a zorb circle")[0]
    file = put("embeddings/zorb.safetensors")
    save_file({"emb_params": vector("red")}, file)
    done = finished(executor, request("a zorb circle", **SMALL))
    assert not np.array_equal(done.images[0], before)
    assert done.infotext == {"TI hashes": f"zorb: {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"}
    file.write_bytes(b"")
    assert np.array_equal(drawn(executor, "a zorb circle")[0], before)


def test_an_embedding_for_another_model_is_skipped_with_the_reason(
    executor: Executor, put: Callable[[str], Path]
) -> None:
    before = drawn(executor, "a zorb circle")[0]
    file = put("embeddings/zorb.safetensors")
    save_file({"emb_params": torch.ones(2, 768)}, file)
    picture, warnings = drawn(executor, "a zorb circle")
    assert np.array_equal(picture, before)
    assert warnings == ("embedding 'zorb' was skipped: its vectors have 768 numbers, and the model's 128",)
    save_file({"clip_l": torch.ones(2, 128), "clip_g": torch.ones(2, 1280)}, file)
    assert drawn(executor, "a zorb circle")[1] == (
        "embedding 'zorb' was skipped: it was made for two text encoders, and the model has one text encoder",
    )


def test_an_sdxl_embedding_has_vectors_for_each_encoder(tmp_path: Path) -> None:
    path = tmp_path / "xl.safetensors"
    save_file({"clip_l": torch.full((3, 64), 1.0), "clip_g": torch.full((3, 128), 2.0)}, path)
    found = read_embedding(path, {"text_encoder": 64, "text_encoder_2": 128})
    assert {part: (*rows.shape, rows.mean().item()) for part, rows in found.items()} == {
        "text_encoder": (3, 64, 1.0),
        "text_encoder_2": (3, 128, 2.0),
    }
    assert read_embedding(path, {"text_encoder_2": 128}).keys() == {"text_encoder_2"}  # the refiner
    with pytest.raises(ValueError, match="its vectors have 64 numbers, and the model's 768"):
        read_embedding(path, {"text_encoder": 768, "text_encoder_2": 128})
    save_file({"clip_l": torch.ones(3, 64), "clip_g": torch.ones(2, 128)}, path)
    with pytest.raises(ValueError, match="another number of vectors for each text encoder"):
        read_embedding(path, {"text_encoder": 64, "text_encoder_2": 128})
    save_file({"emb_params": torch.ones(1, 64)}, path)
    with pytest.raises(ValueError, match="made for one text encoder, and the model has two"):
        read_embedding(path, {"text_encoder": 64, "text_encoder_2": 128})


# VAE files.


def white() -> dict[str, Tensor]:
    """The shipped VAE, but for its last layer: every picture is white."""
    tensors = load_file(SHAPES / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_out.weight"].zero_()
    tensors["decoder.conv_out.bias"].fill_(1)
    return tensors


@pytest.mark.parametrize("layout", zoo.VAES)
def test_a_vae_file_decodes_in_place_of_the_models_own(
    executor: Executor, put: Callable[[str], Path], layout: str
) -> None:
    file = put("vae/white.safetensors")
    save_file(dict(zoo.VAES[layout](white())), file)
    before = drawn(executor, "a red circle")[0]
    done = finished(executor, request("a red circle", vae="white", **SMALL))
    assert done.images[0].min() == 255
    assert done.infotext == {
        "VAE hash": hashlib.sha256(file.read_bytes()).hexdigest()[:10],
        "VAE": "white.safetensors",
    }
    assert np.array_equal(drawn(executor, "a red circle")[0], before)


def test_a_vae_named_like_the_model_is_taken_unless_none_is_asked_for(
    executor: Executor, put: Callable[[str], Path]
) -> None:
    before = drawn(executor, "a red circle")[0]
    save_file(white(), put("vae/shapes.vae.safetensors"))
    assert drawn(executor, "a red circle")[0].min() == 255
    assert np.array_equal(drawn(executor, "a red circle", vae="None")[0], before)


def test_a_vae_of_another_kind_is_skipped_with_the_reason(executor: Executor, put: Callable[[str], Path]) -> None:
    tensors = white()
    tensors["decoder.conv_in.weight"] = torch.zeros(32, 16, 3, 3)
    save_file(tensors, put("vae/big.safetensors"))
    before = drawn(executor, "a red circle")[0]
    picture, (warning,) = drawn(executor, "a red circle", vae="big")
    assert np.array_equal(picture, before)
    assert warning.startswith("VAE 'big' was skipped: its decoder.conv_in.weight is 32x16x3x3, and ")


# The shipped LoRA.


def ink(pixels: NDArray[np.uint8]) -> float:
    """The share of the picture that is nearly black."""
    return float((pixels.max(2) < 70).mean())


def test_the_shipped_lora_draws_outlines_of_ink_around_the_same_scene(draw: Draw) -> None:
    for prompt in (
        "a small blue square on a yellow background on the left",
        "a large yellow star on a purple background",
    ):
        plain, half, inked = (
            draw(f"{tag}{prompt}", steps=12) for tag in ("", "<lora:shapes-ink:0.5>", "<lora:shapes-ink:1>")
        )
        assert ink(plain) < 0.005
        assert ink(half) < ink(inked)
        assert ink(inked) > 0.03
        assert not np.array_equal(plain, half)
        assert seen(inked).background == seen(plain).background == asked(prompt).background
        assert seen(inked).side == asked(prompt).side


def test_an_embedding_and_a_lora_go_together(
    executor: Executor, put: Callable[[str], Path], vector: Callable[[str], Tensor]
) -> None:
    save_file({"emb_params": vector("red")}, put("embeddings/zorb.safetensors"))
    lora_zoo.write(
        put("loras/text.safetensors"),
        lora_zoo.kohya("lora_te_text_model_encoder_layers_0_self_attn_q_proj", (128, 128), lora_zoo.Maker()),
    )
    words, learned, without = (
        drawn(executor, p)[0] for p in ("<lora:text:1>a red circle", "<lora:text:1>a zorb circle", "a zorb circle")
    )
    assert np.array_equal(words, learned)
    assert not np.array_equal(without, learned)


# A second pass with words of its own.


def test_a_second_pass_has_the_loras_and_embeddings_that_its_own_prompt_names(
    executor: Executor, pictures: dict[str, Image.Image], put: Callable[[str], Path], vector: Callable[[str], Tensor]
) -> None:
    """Each pass against the same one made alone: a picture, and one that begins with it, enlarged."""
    file = put("embeddings/zorb.safetensors")
    save_file({"emb_params": vector("red")}, file)
    lora_zoo.write(
        put("loras/text.safetensors"),
        lora_zoo.kohya("lora_te_text_model_encoder_layers_0_self_attn_q_proj", (128, 128), lora_zoo.Maker()),
    )
    first, second = "<lora:text:1>a blue circle", "<lora:shapes-ink:0.5>a zorb circle"
    job = request(
        first, **SMALL, count=2, hires=hires("Lanczos", width=128, height=128, steps=2, prompt=second, strength=0.5)
    )
    done = finished(executor, job)
    for number, image in enumerate(done.images):
        small, _ = drawn(executor, first, seed=1 + number)
        pictures["small"] = Image.fromarray(small).resize((128, 128), LANCZOS)
        alone = from_picture(second, "small", steps=4, strength=0.25, seed=1 + number)  # 2 of 4 steps, as above
        assert np.array_equal(image, finished(executor, alone).images[0])
    assert [(lora.name, lora.scale) for lora in done.loras_applied] == [("text", 1), ("shapes-ink", 0.5)]
    assert done.loras_skipped == ()
    assert [item.split(":")[0] for item in done.infotext["Lora hashes"].split(", ")] == ["text", "shapes-ink"]
    assert done.infotext["TI hashes"] == f"zorb: {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"


def test_a_lora_that_only_the_second_pass_names_is_skipped_with_the_reason_where_it_is_missing(
    executor: Executor,
) -> None:
    second = hires(width=128, height=128, steps=1, prompt="<lora:gone:1><lora:shapes-ink:1>a circle")
    done = finished(executor, request("<lora:shapes-ink:1>a circle", **SMALL, hires=second))
    assert [lora.name for lora in done.loras_applied] == ["shapes-ink"]
    assert [lora.name for lora in done.loras_skipped] == ["gone"]
