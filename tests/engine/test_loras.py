"""LoRAs of every layout on the shipped model: what becomes of its weights and pictures, and that all of it is undone."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_zoo as zoo
import numpy as np
import pytest
import torch
from asking import Draw, finished, request
from diffusers import StableDiffusionPipeline
from torch import Tensor

from diffusion_api.catalog import library
from diffusion_api.catalog.library import Library
from diffusion_api.engine import devices
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.extras import Extras
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.engine.loras import Patches
from diffusion_api.settings import DATA

SHAPES = DATA / "models" / "shapes"
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
POINTWISE = "mid_block.attentions.0.proj_in"
LAYERS = (LINEAR, CONVOLUTION, POINTWISE)
TEXT_LAYER = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def lane() -> SD1:
    with torch.inference_mode():
        return SD1.from_folder(SHAPES, devices.choose("cpu"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "stable_diffusion" / "models").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def loras(home: Path) -> Path:
    return home / "stable_diffusion" / "loras"


@pytest.fixture
def extras(home: Path) -> Extras:
    return Extras(Library(home, home / "stable_diffusion" / "models", DATA / "models"))


@pytest.fixture
def attach(lane: SD1, extras: Extras) -> Iterator[Callable[..., Any]]:
    """``attach(prompt, …)`` → what became of it, on a model that has its own weights again afterwards."""

    def attached(*prompt: str, **changes: object) -> Any:
        with torch.inference_mode():
            return extras.attach(lane, request(*prompt, **changes))

    yield attached
    with torch.inference_mode():
        lane.patches.detach()


def weights(lane: SD1) -> dict[str, Tensor]:
    networks = {"unet": lane.unet, "text_encoder": lane.text_encoder, "vae": lane.vae}
    return {f"{part}.{name}": p.detach().clone() for part, n in networks.items() for name, p in n.named_parameters()}


def differing(lane: SD1, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in weights(lane).items() if not torch.equal(tensor, before[name])}


def flat(path: str) -> str:
    return path.replace(".", "_")


@pytest.mark.parametrize("layout", zoo.LAYOUTS)
def test_each_layout_changes_the_weights_as_its_paper_says(
    lane: SD1, loras: Path, attach: Callable[..., Any], layout: str
) -> None:
    before, draw = weights(lane), zoo.Maker()
    files = {
        path: zoo.LAYOUTS[layout]("x", tuple(lane.unet.get_parameter(f"{path}.weight").shape), draw) for path in LAYERS
    }
    files |= {TEXT_LAYER: zoo.LAYOUTS[layout]("x", (128, 128), draw)}
    tensors = {
        f"{'lora_te_text_model_' if path == TEXT_LAYER else 'lora_unet_'}{flat(path)}{name[1:]}": tensor
        for path, found in files.items()
        for name, tensor in found.items()
    }
    zoo.write(loras / "one.safetensors", tensors)
    done = attach("<lora:one:0.4:0.7> a circle")
    assert [(a.name, a.scale, a.text_scale) for a in done.applied] == [("one", 0.7, 0.4)]
    assert done.warnings == done.skipped == ()
    names = {path: f"{'text_encoder' if path == TEXT_LAYER else 'unet'}.{path}.weight" for path in files}
    assert differing(lane, before) == set(names.values())
    for path, found in files.items():
        own = before[names[path]]
        expected = zoo.changed(own, {n[2:]: t for n, t in found.items()}, 0.4 if path == TEXT_LAYER else 0.7)
        assert np.abs(weights(lane)[names[path]].double().numpy() - expected).max() < 1e-5
    attach("a circle")
    assert differing(lane, before) == set()


NAMES: dict[str, tuple[str, ...]] = {
    "kohya": (f"lora_unet_{flat(LINEAR)}.lora_down.weight", f"lora_unet_{flat(LINEAR)}.lora_up.weight"),
    "kohya, names of the original": (
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
    ),
    "original names with dots": (
        "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.lora_down.weight",
        "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.lora_up.weight",
    ),
    "PEFT in diffusers": (f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight"),
    "PEFT by itself": (f"base_model.model.{LINEAR}.lora_A.weight", f"base_model.model.{LINEAR}.lora_B.weight"),
    "PEFT with its adapter's name": (f"unet.{LINEAR}.lora_A.default.weight", f"unet.{LINEAR}.lora_B.default.weight"),
    "diffusers": (f"unet.{LINEAR}.lora.down.weight", f"unet.{LINEAR}.lora.up.weight"),
    "diffusers of old": (
        LINEAR.replace("attn2.", "attn2.processor.") + "_lora.down.weight",
        LINEAR.replace("attn2.", "attn2.processor.") + "_lora.up.weight",
    ),
}


@pytest.mark.parametrize("naming", NAMES)
def test_a_layer_is_known_by_every_name(lane: SD1, loras: Path, attach: Callable[..., Any], naming: str) -> None:
    draw = zoo.Maker()
    down, up = NAMES[naming]
    pair = {down: draw(zoo.RANK, 128), up: draw(128, zoo.RANK)}
    zoo.write(loras / "one.safetensors", pair)
    before = weights(lane)
    assert attach(loras=[{"name": "one", "scale": 0.5}]).warnings == ()
    assert differing(lane, before) == {f"unet.{LINEAR}.weight"}
    added = 0.5 * pair[up].double() @ pair[down].double()
    change = weights(lane)[f"unet.{LINEAR}.weight"].double() - before[f"unet.{LINEAR}.weight"].double()
    assert torch.allclose(change, added, atol=1e-5)


def test_two_loras_add_up_and_one_may_be_asked_for_twice(lane: SD1, loras: Path, attach: Callable[..., Any]) -> None:
    for number, name in enumerate(("one", "two")):
        zoo.write(loras / f"{name}.safetensors", zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker(number)))
    own = lane.unet.get_parameter(f"{LINEAR}.weight").clone()

    def change(prompt: str) -> Tensor:
        attach(prompt)
        return lane.unet.get_parameter(f"{LINEAR}.weight") - own

    one, two = change("<lora:one>"), change("<lora:two>")
    assert torch.allclose(change("<lora:one><lora:two:0.5>"), one + 0.5 * two, atol=1e-6)
    assert torch.allclose(change("<lora:one:0.3><lora:one:0.7>"), one, atol=1e-6)


def test_any_order_of_sets_leaves_every_bit_as_it_was(lane: SD1, loras: Path, attach: Callable[..., Any]) -> None:
    names = []
    for number, (layout, make) in enumerate(zoo.LAYOUTS.items()):
        names.append(flat(layout).replace(" ", "").replace(",", ""))
        zoo.write(loras / f"{names[-1]}.safetensors", make(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker(number)))
    before, dice = weights(lane), random.Random(0)
    for _ in range(30):
        attach("".join(f"<lora:{name}:{dice.uniform(-2, 2):.2f}>" for name in dice.sample(names, dice.randint(0, 4))))
        if dice.random() < 0.3:
            attach("a circle")
            assert differing(lane, before) == set()
    attach("a circle")
    assert differing(lane, before) == set()


def test_weights_in_half_precision_come_back_to_the_bit(loras: Path, extras: Extras) -> None:
    zoo.write(loras / "one.safetensors", zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker()))
    with torch.inference_mode():
        half = SD1.from_folder(SHAPES, devices.choose("cpu"))
        half.unet.half()
        before = half.unet.get_parameter(f"{LINEAR}.weight").clone()
        extras.attach(half, request("<lora:one:1>"))
        expected = zoo.changed(
            before, {n.split(".", 1)[1]: t for n, t in zoo.kohya("x", (128, 128), zoo.Maker()).items()}, 1
        )
        changed = half.unet.get_parameter(f"{LINEAR}.weight")
        rounded = torch.from_numpy(expected).half()  # were it worked out in float16, a third of them would differ
        assert (changed != rounded).double().mean() < 0.01
        extras.attach(half, request())
        assert torch.equal(half.unet.get_parameter(f"{LINEAR}.weight"), before)


def test_a_patch_that_fails_half_way_changes_nothing(lane: SD1) -> None:
    patches = Patches({"unet": lane.unet}, {})
    before = weights(lane)

    def failing(weight: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        patches.attach(
            {("unet", f"{LINEAR}.weight"): [lambda w: w * 2], ("unet", f"{POINTWISE}.weight"): [failing]}, "label"
        )
    assert differing(lane, before) == set()
    assert patches.label is None


def test_the_same_set_again_costs_nothing(loras: Path, lane: SD1, attach: Callable[..., Any]) -> None:
    zoo.write(loras / "one.safetensors", zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker()))
    first = attach("<lora:one:1>a circle")
    lane.patches.label[1].vae["seen"] = "once"  # a set that is attached anew would not know
    again = attach("<lora:one:1>a star")
    assert again.applied == first.applied
    assert again.infotext["seen"] == "once"


def test_a_file_that_is_replaced_is_read_again(
    lane: SD1, loras: Path, attach: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "FRESH", 0.0)
    monkeypatch.setattr(library, "LONG_SCAN", 0)
    found = []
    for seed in (1, 2):
        zoo.write(loras / "one.safetensors", zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker(seed)))
        attach("<lora:one:1>")
        found.append(lane.unet.get_parameter(f"{LINEAR}.weight").clone())
    assert not torch.equal(*found)


# What cannot be applied, and what is said.

XL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 192),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": (128, 4),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 128),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": (128, 4),
}


def test_a_lora_of_another_family_is_skipped_with_the_reason(
    lane: SD1, loras: Path, attach: Callable[..., Any]
) -> None:
    draw = zoo.Maker()
    zoo.write(loras / "big.safetensors", {name: draw(*shape) for name, shape in XL.items()})
    before = weights(lane)
    done = attach("<lora:big:1>a circle")
    assert done.applied == ()
    (skipped,) = done.skipped
    assert skipped.name == "big"
    assert done.warnings == (
        "LoRA 'big' appears to be designed for SDXL models, but you're using a standard SD model. Try using an SDXL base "
        f"model. It was skipped: {skipped.reason}.",
    )
    assert differing(lane, before) == set()


def test_the_shipped_lora_for_xl_shows_it(lane: SD1, attach: Callable[..., Any]) -> None:
    before = weights(lane)
    (warning,) = attach("<lora:shapes-xl-ink:1>a circle").warnings
    assert warning.startswith(
        "LoRA 'shapes-xl-ink' appears to be designed for SDXL models, but you're using a standard SD model. "
        "Try using an SDXL base model. It was skipped: "
    )
    assert differing(lane, before) == set()


def test_one_wrong_shape_is_enough_and_is_named(lane: SD1, loras: Path, attach: Callable[..., Any]) -> None:
    tensors = zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 64), zoo.Maker())
    tensors |= zoo.kohya(f"lora_unet_{flat(POINTWISE)}", (128, 128, 1, 1), zoo.Maker())
    zoo.write(loras / "odd.safetensors", tensors)
    before = weights(lane)
    (warning,) = attach("<lora:odd:1>").warnings
    assert warning == (
        "LoRA 'odd' may not be compatible with 'shapes'. Check if the LoRA was trained for the same model architecture. "
        f"It was skipped: {LINEAR}.weight is 128x64 there and 128x128 in the model."
    )
    assert differing(lane, before) == set()


def test_what_matches_in_part_is_applied_and_counted(lane: SD1, loras: Path, attach: Callable[..., Any]) -> None:
    tensors = zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker())
    tensors |= zoo.kohya("lora_unet_down_blocks_9_attentions_0_proj_in", (128, 128), zoo.Maker())
    zoo.write(loras / "half.safetensors", tensors)
    before = weights(lane)
    done = attach("<lora:half:1>")
    assert [lora.name for lora in done.applied] == ["half"]
    (warning,) = done.warnings
    assert warning.startswith(
        "LoRA 'half' was applied in part: 3 of its 6 tensors belong to no layer of model 'shapes'"
    )
    assert differing(lane, before) == {f"unet.{LINEAR}.weight"}


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": (
        "x.safetensors",
        b"",
        "it cannot be used: loras/x.safetensors is no safetensors file: the length of its header",
    ),
    "a page": (
        "x.safetensors",
        b"<!DOCTYPE html><html><body>Not found</body></html>",
        "it cannot be used: loras/x.safetensors is no safetensors file: the length of its header is wrong (a web page",
    ),
    "no pickle": ("x.pt", b"this is no pickle", "x.pt cannot be read: it is damaged, or holds more than tensors"),
    "an empty pickle": ("x.bin", b"", "x.bin cannot be read: "),
    "code": ("x.pt", b"cos\nsystem\n(S'touch owned'\ntR.", "x.pt cannot be read: it is damaged, or holds more than"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_skipped_and_the_job_goes_on(
    lane: SD1, loras: Path, attach: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, reason = BROKEN[kind]
    loras.mkdir()
    (loras / name).write_bytes(content)
    done = attach("<lora:x:1>a circle")
    assert done.applied == ()
    assert done.warnings[0].startswith(f"LoRA 'x' was skipped: {reason}")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_a_pickle_of_tensors_is_read(lane: SD1, loras: Path, attach: Callable[..., Any], suffix: str) -> None:
    loras.mkdir()
    tensors = zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker())
    torch.save({"state_dict": tensors} if suffix == ".pth" else tensors, loras / f"one{suffix}")
    before = weights(lane)
    assert [lora.name for lora in attach(f"<lora:one{suffix}:1>").applied] == ["one"]
    assert differing(lane, before) == {f"unet.{LINEAR}.weight"}


def test_numbers_that_are_none_are_refused(loras: Path, attach: Callable[..., Any]) -> None:
    tensors = zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker())
    tensors[f"lora_unet_{flat(LINEAR)}.lora_up.weight"][0, 0] = float("nan")
    zoo.write(loras / "nan.safetensors", tensors)
    assert attach("<lora:nan:1>").warnings == ("LoRA 'nan' was skipped: it holds numbers that are not finite (NaN)",)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "outside", ".", ""])
def test_a_name_is_never_a_path(home: Path, attach: Callable[..., Any], name: str) -> None:
    zoo.write(home.parent / "outside.safetensors", zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker()))
    done = attach(loras=[{"name": name}])
    assert done.warnings == (f"LoRA {name!r} was skipped: it is not installed",)
    assert [skipped.reason for skipped in done.skipped] == ["it is not installed"]


def test_the_hash_is_that_of_a1111(loras: Path, attach: Callable[..., Any]) -> None:
    tensors = zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), zoo.Maker())
    path = zoo.write(loras / "one.safetensors", tensors, {"note": "first"})
    zoo.write(loras / "two, of: it.safetensors", tensors, {"sshs_model_hash": "0123456789abcdef" * 4})
    data = path.read_bytes()
    own = hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()[:12]
    done = attach("<lora:one:1>", loras=[{"name": "two, of: it"}])
    assert done.infotext == {"Lora hashes": f"two of it: 0123456789ab, one: {own}"}


# Pictures.


@pytest.fixture(scope="module")
def shared(models_dir: Path) -> Path:
    """The LoRAs of the engine that the tests here share."""
    folder = models_dir.parent / "stable_diffusion" / "loras"
    parts = {flat(path): (128, 128) for path in (LINEAR, LINEAR.replace("to_k", "to_v"))}
    tensors: zoo.Tensors = {}
    for path, shape in parts.items():
        tensors |= zoo.kohya(f"lora_unet_{path}", shape, zoo.Maker(1))
    tensors |= zoo.kohya(f"lora_te_text_model_{flat(TEXT_LAYER)}", (128, 128), zoo.Maker(2))
    zoo.write(folder / "noisy.safetensors", {name: tensor * 2 for name, tensor in tensors.items()})
    return folder


def test_pictures_say_that_strength_is_real_and_that_nothing_stays(draw: Draw, shared: Path) -> None:
    words = "a large red circle on a blue background"
    plain, at_0, at_half, at_1, text, unet, after = (
        draw(f"{tag}{words}", steps=2, width=64, height=64)
        for tag in (
            *("", "<lora:noisy:0>", "<lora:noisy:0.5>", "<lora:noisy:1>"),
            *("<lora:noisy:1:0>", "<lora:noisy:0:1>", ""),
        )
    )
    assert np.array_equal(plain, at_0)
    assert np.array_equal(plain, after)
    different = [plain, at_half, at_1, text, unet]
    for number, one in enumerate(different):
        for other in different[number + 1 :]:
            assert not np.array_equal(one, other)


def test_the_field_and_the_prompt_mean_the_same(executor: Executor, shared: Path) -> None:
    fields = dict(steps=2, width=64, height=64)
    by_prompt = finished(executor, request("<lora:noisy:0.5:0.8>a circle", **fields))
    by_field = finished(
        executor, request("a circle", loras=[{"name": "noisy", "scale": 0.8, "text_scale": 0.5}], **fields)
    )
    assert np.array_equal(by_prompt.images[0], by_field.images[0])
    assert by_prompt.loras_applied == by_field.loras_applied
    assert by_prompt.loras_skipped == ()


# Against diffusers and PEFT, with what they load: no LoHa, no LoKr, no DoRA in kohya's layout or of a text encoder.


def of_diffusers() -> dict[str, zoo.Tensors]:
    draw = zoo.Maker(5)
    text = f"text_encoder.text_model.{TEXT_LAYER}"
    unet = {f"unet.{LINEAR}.lora_A.weight": draw(3, 128), f"unet.{LINEAR}.lora_B.weight": draw(128, 3)}
    kohya = zoo.kohya(f"lora_unet_{flat(LINEAR)}", (128, 128), draw)
    kohya |= zoo.kohya(f"lora_unet_{flat(CONVOLUTION)}", (64, 64, 3, 3), draw)
    for layer in ("q_proj", "out_proj"):
        path = flat(TEXT_LAYER).replace("q_proj", layer)
        kohya |= zoo.kohya(f"lora_te_text_model_{path}", (128, 128), draw)
    return {
        "kohya, LoCon": kohya,
        "PEFT": unet | {f"{text}.lora_A.weight": draw(3, 128), f"{text}.lora_B.weight": draw(128, 3)},
        "DoRA": unet | {f"unet.{LINEAR}.lora_magnitude_vector": draw(128).abs() + 9},
    }


@pytest.mark.parametrize("layout", of_diffusers())
def test_diffusers_draws_the_same(lane: SD1, loras: Path, attach: Callable[..., Any], layout: str) -> None:
    tensors = {name: tensor.float() for name, tensor in of_diffusers()[layout].items()}
    zoo.write(loras / "one.safetensors", tensors)
    pipeline = StableDiffusionPipeline.from_pretrained(SHAPES, local_files_only=True, dtype=torch.float32)
    pipeline.load_lora_weights(tensors)
    ids = pipeline.tokenizer("a red star", padding="max_length", max_length=77, return_tensors="pt").input_ids
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def drawn(model: Any) -> Tensor:
        return model.unet(x, 500, model.text_encoder(ids).last_hidden_state).sample

    with torch.inference_mode():
        theirs = drawn(pipeline)
        assert not torch.allclose(drawn(lane), theirs, atol=1e-3)
        assert attach("<lora:one:1>").warnings == ()
        assert torch.allclose(drawn(lane), theirs, atol=1e-4)
