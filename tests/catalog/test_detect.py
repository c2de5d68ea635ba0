"""The family of a model, from its files alone."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import fake_models
import pytest
from fake_models import checkpoint, diffusers_folder, transformer_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_api.catalog.detect import (
    MAX_HEADER,
    Unrecognised,
    file_family,
    file_schedule,
    folder_family,
    safetensors_header,
    weight_files,
)
from diffusion_api.settings import DATA

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def written(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (fake_models.SD1_KEYS, ("sd1", 512)),
        (fake_models.SD2_KEYS, ("sd2", 768)),
        (fake_models.SDXL_KEYS, ("sdxl", 1024)),
        (fake_models.REFINER_KEYS, ("sdxl-refiner", 1024)),
        (fake_models.INPAINTING_KEYS, ("sd1", 512)),
    ],
)
def test_a_checkpoint_is_known_by_its_tensors(
    tmp_path: Path, keys: dict[str, list[int]], found: tuple[str, int]
) -> None:
    for name in ("sd1.safetensors", "sdxl-1.0.safetensors", "lora.safetensors"):
        assert file_family(checkpoint(tmp_path / name, keys)) == found


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ("sd1", 512)),
        ({"sample_size": 32}, ("sd1", 256)),
        ({"pipeline": "StableDiffusionImg2ImgPipeline"}, ("sd1", 512)),
        ({"pipeline": "StableDiffusionInpaintPipeline", "unet": {"in_channels": 9}}, ("sd1", 512)),
        ({"unet": {"use_linear_projection": True}, "sample_size": 96}, ("sd2", 768)),
        ({"pipeline": "StableDiffusionXLPipeline", "sample_size": 128}, ("sdxl", 1024)),
        (
            {
                "pipeline": "StableDiffusionXLImg2ImgPipeline",
                "index": {"text_encoder": [None, None]},
                "sample_size": 128,
            },
            ("sdxl-refiner", 1024),
        ),
    ],
)
def test_a_folder_is_known_by_its_configs(tmp_path: Path, options: dict[str, object], found: tuple[str, int]) -> None:
    assert folder_family(diffusers_folder(tmp_path / "sdxl", **options)) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(("config", "size"), [({}, 1024), ({"sample_size": 64}, 512), ({"sample_size": [6, 8]}, 1024)])
def test_any_pipeline_is_called_after_its_class(tmp_path: Path, config: dict[str, Any], size: int) -> None:
    assert folder_family(transformer_folder(tmp_path, **config)) == ("FluxPipeline", size)


def test_the_native_size_is_that_of_the_latents_times_the_autoencoders_factor(tmp_path: Path) -> None:
    transformer_folder(tmp_path, pipeline="SanaPipeline", sample_size=32)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"encoder_block_out_channels": [1] * 6}))
    assert folder_family(tmp_path) == ("SanaPipeline", 1024)


def test_a_modular_pipeline_has_an_index_of_its_own(tmp_path: Path) -> None:
    index = transformer_folder(tmp_path, pipeline="Flux3ModularPipeline") / "model_index.json"
    content = json.loads(index.read_text())
    content["transformer"].append({"subfolder": "transformer"})
    (tmp_path / "modular_model_index.json").write_text(json.dumps(content))
    index.unlink()
    assert folder_family(tmp_path) == ("Flux3ModularPipeline", 1024)


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"_class_name": ["mine", "MyPipeline"]}, "its index names .*MyPipeline.*, and only pipelines of diffusers"),
        ({"_class_name": "Mine"}, "its index names Mine, and only pipelines of diffusers are run"),
        ({}, "its index names None, and only pipelines of diffusers are run"),
        (
            {"transformer": ["mine", "Net"]},
            "its index names mine.Net, and only code of diffusers and transformers is run",
        ),
        ({"transformer": ["mine", "Net", {}]}, "its index names mine.Net, and only code of"),
        ({"transformer": [["unidiffuser"], "Net"]}, "its index names .*Net, and only code of"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "its text_encoder/ holds no safetensors weights"),
    ],
)
def test_a_pipeline_that_brings_code_or_lacks_weights_is_refused(
    tmp_path: Path, index: dict[str, Any], why: str
) -> None:
    file = transformer_folder(tmp_path) / "model_index.json"
    file.write_text(json.dumps((json.loads(file.read_text()) | index) if index else {}))
    with pytest.raises(Unrecognised, match=why):
        folder_family(tmp_path)


def test_unidiffuser_names_its_parts_by_a_folder_of_diffusers(tmp_path: Path) -> None:
    file = transformer_folder(tmp_path, pipeline="UniDiffuserPipeline", sample_size=64) / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformer": ["unidiffuser", "UniDiffuserModel"]}))
    assert folder_family(tmp_path) == ("UniDiffuserPipeline", 512)


def test_a_gguf_file_is_weights(tmp_path: Path) -> None:
    transformer_folder(tmp_path)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "transformer" / "flux1-dev-Q4_K_S.gguf").write_bytes(b"GGUF")
    assert folder_family(tmp_path) == ("FluxPipeline", 1024)


@pytest.mark.parametrize("keys", [fake_models.LORA_KEYS, {}])
def test_other_tensors_are_no_checkpoint(tmp_path: Path, keys: dict[str, list[int]]) -> None:
    with pytest.raises(Unrecognised, match=r"it is no checkpoint.*LoRA"):
        file_family(checkpoint(tmp_path / "x.safetensors", keys))


def test_an_unfinished_download_is_noticed(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x.safetensors", fake_models.SD1_KEYS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(Unrecognised, match=r"unfinished download|length of its header|header is damaged"):
            file_family(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(Unrecognised, match=f"has {len(whole) + 4} bytes and should have {len(whole)}"):
        file_family(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><html><body>Not Found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 0) + b"{}",
        struct.pack("<Q", 100) + b"{}",
    ],
    ids=["empty", "HTML", "LFS pointer", "2^63", "2^64-1", "no header", "beyond the end"],
)
def test_what_is_no_safetensors_file_is_told_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(Unrecognised, match=r"x\.safetensors is no safetensors file"):
        file_family(path)


@pytest.mark.parametrize("length", [2**63, 100 * 10**9, MAX_HEADER + 1])
def test_a_header_is_not_read_that_is_larger_than_any_real_one(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(path, 200 * 10**9)
    with pytest.raises(Unrecognised, match="the length of its header is wrong"):
        file_family(path)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        [],
        "text",
        {FIRST: 1},
        {FIRST: {}},
        {FIRST: {"dtype": "F32", "shape": "4", "data_offsets": [0, 0]}},
        {FIRST: {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
        {FIRST: {"dtype": "F32", "shape": [8, 4, 3, 3], "data_offsets": ["a", None]}},
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_header_is_told_so(tmp_path: Path, header: object) -> None:
    with pytest.raises(Unrecognised, match="its header is damaged"):
        file_family(written(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(("shape", "channels"), [([], None), ([4], None), ([8, 8, 3, 3], 8)])
def test_a_model_that_reads_something_else_is_told_so(tmp_path: Path, shape: list[int], channels: int | None) -> None:
    header = {FIRST: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    with pytest.raises(
        Unrecognised, match=f"its UNet reads {channels} channels; only 4, or 9 for inpainting, are known"
    ):
        file_family(written(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    ("missing", "added", "reason"),
    [
        ("cond_stage_model.", {}, r"it holds no text encoder \(cond_stage_model\.\* or conditioner\.\*\)"),
        ("first_stage_model.", {}, r"it holds no autoencoder \(first_stage_model\.\*\)"),
        ("nothing", {"model.diffusion_model.label_emb.0.0.weight": [8, 8]}, "reads more than words"),
        ("nothing", {"model.diffusion_model.input_blocks.0.0.scale_weight": [1]}, r"are scaled \(scale_weight\)"),
    ],
)
def test_a_checkpoint_that_is_not_whole_or_of_another_kind_is_told_so(
    tmp_path: Path, missing: str, added: dict[str, list[int]], reason: str
) -> None:
    keys = {name: shape for name, shape in fake_models.SD1_KEYS.items() if not name.startswith(missing)}
    with pytest.raises(Unrecognised, match=reason):
        file_family(checkpoint(tmp_path / "x.safetensors", keys | added))


@pytest.mark.parametrize(
    ("keys", "metadata", "schedule"),
    [
        ({}, {}, {}),
        ({"v_pred": []}, {}, {"prediction_type": "v_prediction"}),
        ({"v_pred": [], "ztsnr": []}, {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ({}, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ({}, {"modelspec.predict_key": "epsilon"}, {"prediction_type": "epsilon"}),
        ({"v_pred": []}, {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}),
        ({}, {"modelspec.prediction_type": "something else"}, {}),
    ],
)
def test_a_file_says_how_its_model_predicts(
    tmp_path: Path, keys: dict[str, list[int]], metadata: dict[str, str], schedule: dict[str, object]
) -> None:
    path = checkpoint(tmp_path / "x.safetensors", fake_models.SDXL_KEYS | keys, metadata)
    assert file_schedule(path) == schedule


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], ["model.fp16.safetensors"]),
        (["model.non_ema.safetensors"], ["model.non_ema.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.fp16.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        ),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors"],
            ["model.safetensors"],
        ),
    ],
)
def test_one_set_of_weights_is_read_of_a_folder(tmp_path: Path, files: list[str], read: list[str]) -> None:
    for name in files:
        checkpoint(tmp_path / name, {})
    assert [path.name for path in weight_files(tmp_path)] == read


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    checkpoint(tmp_path / "unet" / "model-00002-of-00003.safetensors", {})
    with pytest.raises(Unrecognised, match=r"its unet/ holds 1 of 3 files \(an unfinished download\?\)"):
        weight_files(tmp_path / "unet")


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", {"__metadata__": {"ss_network_dim": "8"}})
    assert safetensors_header(path) == {}


def test_a_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(Unrecognised, match=r"x\.safetensors cannot be read: No such file"):
        file_family(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_folder_with_a_damaged_config_is_told_so(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = diffusers_folder(tmp_path / "model") / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(Unrecognised, match=rf"{path.parent.name}/{path.name} (cannot be read|is no JSON object)"):
        folder_family(tmp_path / "model")


def test_a_folder_needs_its_weights_whole(tmp_path: Path) -> None:
    weights = diffusers_folder(tmp_path / "model") / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(Unrecognised, match=r"diffusion_pytorch_model\.safetensors is no safetensors file"):
        folder_family(tmp_path / "model")
    weights.unlink()
    with pytest.raises(Unrecognised, match=r"its unet/ holds no safetensors weights$"):
        folder_family(tmp_path / "model")
    weights.with_suffix(".bin").write_bytes(b"PK\3\4")
    with pytest.raises(Unrecognised, match=r"no safetensors weights, only \.bin, which can run code when loaded"):
        folder_family(tmp_path / "model")


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "its vae/ holds no safetensors weights"),
        ("text_encoder/model.safetensors", "its text_encoder/ holds no safetensors weights"),
        ("tokenizer/vocab.json", r"its tokenizer/ holds no vocab\.json or tokenizer\.json"),
    ],
)
def test_a_folder_needs_each_part_that_its_index_names(tmp_path: Path, missing: str, reason: str) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree(DATA / "models" / "shapes", folder)
    assert folder_family(folder)[0] == "sd1"
    (folder / missing).unlink()
    with pytest.raises(Unrecognised, match=reason):
        folder_family(folder)


def test_an_unfinished_part_of_a_folder_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(DATA / "models" / "shapes", tmp_path / "shapes")
    weights = tmp_path / "shapes" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Unrecognised, match=r"vae/diffusion_pytorch_model\.safetensors .*unfinished download"):
        folder_family(tmp_path / "shapes")


@settings(deadline=None)
@given(content=st.binary(max_size=200))
def test_no_bytes_at_all_break_it(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    with pytest.raises(Unrecognised):
        file_family(path)
