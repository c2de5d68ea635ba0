"""Whether a LoRA fits a model, from the headers of their files alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import ldm_layout
import pytest
from fake_models import checkpoint

from diffusion_api.catalog.compatibility import Fit, advice, fit, layers, model_shapes, reason
from diffusion_api.catalog.detect import safetensors_header
from diffusion_api.settings import DATA

SHAPES = DATA / "models" / "shapes"
TO_K = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


def found(lora: dict[str, list[int]], model: Path = SHAPES) -> Fit:
    return fit(lora, layers(model_shapes(model, 0)))


def pair(layer: str, out: int, inner: int) -> dict[str, list[int]]:
    return {f"{layer}.lora_down.weight": [4, inner], f"{layer}.lora_up.weight": [out, 4]}


def test_the_shipped_lora_fits_the_shipped_model_as_folder_and_as_single_file(tmp_path: Path) -> None:
    single = tmp_path / "shapes.safetensors"
    ldm_layout.write_checkpoint(SHAPES, DATA / "clip" / "vocab.json", single)
    header = safetensors_header(DATA / "loras" / "shapes-ink.safetensors")
    shapes = {name: tensor.shape for name, tensor in header.items()}
    for model in (SHAPES, single):
        one = found(shapes, model)
        assert one.applies
        assert (len(one.changes), one.unknown, one.misfits) == (len(shapes) // 3, (), ())


@pytest.mark.parametrize(
    ("layer", "applies"),
    [
        (f"lora_unet_{TO_K}", True),
        ("lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k", True),
        ("diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k", True),
        ("lora_te_text_model_encoder_layers_0_self_attn_k_proj", True),
        ("lora_te1_text_model_encoder_layers_0_self_attn_k_proj", True),
        ("text_encoder.text_model.encoder.layers.0.self_attn.k_proj", True),
        ("lora_te2_text_model_encoder_layers_0_self_attn_k_proj", False),
        ("transformer.single_transformer_blocks.0.attn.to_k", False),
        ("lora_unet_double_blocks_0_img_attn_qkv", False),
        ("", False),
    ],
)
def test_layers_are_found_by_all_their_names(layer: str, applies: bool) -> None:
    assert found(pair(layer, 128 if "layers" in layer else 64, 128)).applies is applies


def test_the_layers_of_a_second_text_encoder_are_found_in_its_original_names(tmp_path: Path) -> None:
    """OpenCLIP has one tensor for the three that transformers has."""
    block = "conditioner.embedders.1.model.transformer.resblocks.0."
    model = checkpoint(
        tmp_path / "xl.safetensors",
        {
            f"{block}attn.in_proj_weight": [384, 128],
            f"{block}attn.out_proj.weight": [128, 128],
            f"{block}mlp.c_fc.weight": [256, 128],
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": [256, 64],
            "model.diffusion_model.input_blocks.0.0.weight": [8, 4, 3, 3],
        },
    )
    second = "lora_te2_text_model_encoder_layers_0_"
    for layer, out in (
        ("self_attn_q_proj", 128),
        ("self_attn_v_proj", 128),
        ("self_attn_out_proj", 128),
        ("mlp_fc1", 256),
    ):
        assert found(pair(second + layer, out, 128), model).applies
    assert found(pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 256, 64), model).applies


def test_a_reason_names_the_first_layer_that_differs_and_counts_the_others() -> None:
    wide = pair(f"lora_unet_{TO_K}", 64, 2048) | pair(f"lora_unet_{TO_K.replace('to_k', 'to_v')}", 64, 2048)
    assert reason(found(wide)) == (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight is 64x2048 there and 64x128 in the model, "
        "and 1 other layer differs"
    )
    assert reason(found(pair("lora_unet_x", 1, 1))) == "none of its 2 tensors belongs to a layer of the model"


@pytest.mark.parametrize(
    ("made_for", "family", "text"),
    [
        (
            "sdxl", "sd1",
            "LoRA 'x' appears to be designed for SDXL models, but you're using a standard SD model. "
            "Try using an SDXL base model.",
        ),
        (
            "sd1", "sdxl",
            "LoRA 'x' appears to be designed for SD 1.5 models, but you're using an SDXL model. "
            "Try using a standard SD base model.",
        ),
        (
            None, "sd1",
            "LoRA 'x' may not be compatible with 'm'. Check if the LoRA was trained for the same model architecture.",
        ),
    ],
)  # fmt: skip
def test_the_advice_has_the_words_of_the_original(made_for: str | None, family: str, text: str) -> None:
    assert advice("x", "m", made_for=made_for, family=family) == text


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_down.weight": [4, 128]},
        {"lora_down.weight": [4, 128], "lora_up.weight": [64, 5]},
        {"lora_down.weight": [4], "lora_up.weight": [64]},
        {"lora_down.weight": [4, 128], "lora_up.weight": [64, 4], "dora_scale": [7]},
        {"hada_w1_a": [64, 4], "hada_w1_b": [4, 128], "hada_w2_a": [64, 4]},
        {"hada_w1_a": [64, 4], "hada_w1_b": [4, 128], "hada_w2_a": [64, 4], "hada_w2_b": [5, 128]},
        {"hada_w1_a": [64, 4], "hada_w1_b": [4, 128], "hada_w2_a": [64, 4], "hada_w2_b": [4, 64]},
        {"hada_w1_a": [], "hada_w1_b": [], "hada_w2_a": [], "hada_w2_b": []},
        {"lokr_w1": [4, 4]},
        {"lokr_w1": [4], "lokr_w2": [16, 32]},
        {"lokr_w1": [4, 4], "lokr_w2_a": [16, 3], "lokr_w2_b": [2, 32]},
        {"diff": []},
        {"alpha": []},
    ],
)
def test_tensors_that_make_no_change_are_not_taken_for_one(tensors: dict[str, list[int]]) -> None:
    one = found({f"lora_unet_{TO_K}.{name}": shape for name, shape in tensors.items()})
    assert not one.applies
    assert len(one.unknown) == len(tensors)


def test_it_is_told_without_torch(tmp_path: Path) -> None:
    shutil.copytree(SHAPES / "unet", tmp_path / "m" / "unet")
    program = (
        "import sys, pathlib; from diffusion_api.catalog import compatibility as c\n"
        "print(len(c.layers(c.model_shapes(pathlib.Path(sys.argv[1]), 0))) > 100, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "m"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
