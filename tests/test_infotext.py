from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from diffusion_api.infotext import (
    asked,
    for_request,
    for_upscale,
    from_novelai,
    hashes,
    named,
    ordered,
    parse,
    render,
    restored,
)
from diffusion_api.schema.request import Hires, Img2Img, LoraUse, Mask, Output, Refiner, Txt2Img, Upscale

GOLDEN = """a castle, (stone:1.2) <lora:epic:0.7>
on a hill
Negative prompt: fog,
people
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 123456789, Size: 512x768, \
Model hash: 0123456789, Model: anything-v5, VAE hash: 735e4c3a44, VAE: kl-f8.safetensors, \
Denoising strength: 0.55, Clip skip: 2, RNG: CPU, \
Hires prompt: "a castle, \\"close\\"\\nat night", Hires upscale: 2.5, Hires upscaler: 4x, \
Lora hashes: "epic: 0123456789ab, other: ba9876543210", Version: v1.10.1"""

GOLDEN_PROMPT = "a castle, (stone:1.2) <lora:epic:0.7>\non a hill"
GOLDEN_FIELDS = {
    "Steps": 20,
    "Sampler": "DPM++ 2M",
    "Schedule type": "Karras",
    "CFG scale": 7.0,
    "Seed": 123456789,
    "Size": "512x768",
    "Model hash": "0123456789",
    "Model": "anything-v5",
    "VAE hash": "735e4c3a44",
    "VAE": "kl-f8.safetensors",
    "Denoising strength": 0.55,
    "Clip skip": 2,
    "RNG": "CPU",
    "Hires prompt": 'a castle, "close"\nat night',
    "Hires upscale": 2.5,
    "Hires upscaler": "4x",
    "Lora hashes": "epic: 0123456789ab, other: ba9876543210",
    "Version": "v1.10.1",
}

REQUEST = Txt2Img(
    model="tiny",
    prompt="a cat, 猫",
    negative_prompt="dog",
    steps=25,
    guidance_scale=7.5,
    width=512,
    height=640,
    sampler="euler_a",
    schedule="karras",
    seed=42,
    output=Output(),
)


FULL = REQUEST.model_copy(
    update={
        "count": 2,
        "variation_seed": 2**32 - 1,
        "variation_strength": 0.25,
        "seed_resize_width": 256,
        "seed_resize_height": 320,
        "clip_skip": 2,
        "ensd": 31337,
        "eta": 0.5,
        "s_churn": 1,
        "s_tmin": 0.5,
        "s_tmax": 10,
        "s_noise": 1.01,
        "discard_next_to_last_sigma": True,
        "sigma_min": 0.05,
        "sigma_max": 12,
        "rho": 5.5,
        "guidance_rescale": 0.7,
        "emphasis": "no norm",
    }
)


def fields_of(line: str) -> dict[str, object]:
    return dict(parse("prompt\n" + line).fields)


# writing


def test_a_full_infotext_is_written_as_a1111_writes_it() -> None:
    assert render(GOLDEN_PROMPT, "fog,\npeople", GOLDEN_FIELDS) == GOLDEN


def test_the_infotext_of_a_request_says_how_the_picture_was_made() -> None:
    text = for_request(
        REQUEST,
        sampler_label="Euler a",
        schedule_label="Karras",
        model_name="tiny",
        model_hash="abcdef0123",
        version="DiffusionAPI v1.0.0",
    )
    assert text == (
        "a cat, 猫\nNegative prompt: dog\nSteps: 25, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, "
        "Seed: 42, Size: 512x640, Model hash: abcdef0123, Model: tiny, RNG: NV, Version: DiffusionAPI v1.0.0"
    )


def test_a_refiner_is_told_with_how_its_share_is_counted_and_so_that_it_can_be_asked_for_again() -> None:
    request = REQUEST.model_copy(update={"refiner": Refiner(model="r", switch_at=0.8), "tiling": True})
    text = for_request(
        request, sampler_label="Euler a", schedule_label="Karras", model_name="m", model_hash=None, version="v"
    )
    assert "Refiner: r, Refiner switch at: 0.8, Refiner switch by sampling steps: True" in text
    found, unused = asked(parse(text))
    assert (found["refiner_checkpoint"], found["refiner_switch_at"], found["tiling"]) == ("r", 0.8, True)
    assert unused == ()


def test_all_that_decides_the_picture_is_written_with_a1111s_keys_and_in_its_order() -> None:
    text = for_request(
        FULL, number=1, sampler_label="Euler a", schedule_label="Karras", model_name="m", model_hash=None, version="v"
    )
    assert text.splitlines()[-1] == (
        "Steps: 25, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x640, Model: m, "
        "Variation seed: 0, Variation seed strength: 0.25, Seed resize from: 256x320, Clip skip: 2, ENSD: 31337, RNG: NV, "
        "Emphasis: No norm, Eta: 0.5, Sigma churn: 1, Sigma tmin: 0.5, Sigma tmax: 10, Sigma noise: 1.01, "
        "Discard penultimate sigma: True, Schedule min sigma: 0.05, Schedule max sigma: 12, Schedule rho: 5.5, "
        "CFG Rescale: 0.7, Version: v"
    )


def test_a_model_without_a_hash_leaves_the_hash_out() -> None:
    text = for_request(REQUEST, sampler_label="a", schedule_label="b", model_name="tiny", model_hash=None, version="v")
    assert "Model hash" not in text


def test_an_empty_negative_prompt_has_no_line() -> None:
    assert render("cat", "", {"Steps": 1}) == "cat\nSteps: 1"


def test_without_prompts_only_the_fields_are_written() -> None:
    assert render("", "", {"Steps": 1, "Seed": 2}) == "Steps: 1, Seed: 2"


def test_without_a_prompt_the_negative_prompt_comes_first() -> None:
    assert render("", "dog", {"Steps": 1}) == "Negative prompt: dog\nSteps: 1"


def test_none_is_absent_while_false_and_zero_are_written() -> None:
    assert (
        render("", "", {"Gone": None, "Off": False, "Zero": 0, "Tiling": True}) == "Off: False, Zero: 0, Tiling: True"
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (7.0, "7"),
        (7.5, "7.5"),
        (0.1, "0.1"),
        (1e-05, "1e-05"),
        (-0.0, "0"),
        (1e22, "1e+22"),
        ("Euler a", "Euler a"),
        ('a"b', 'a"b'),
        ("a,b", '"a,b"'),
        ("a:b", '"a:b"'),
        ("a\nb", '"a\\nb"'),
        ("猫: \\", '"猫: \\\\"'),
        ('say "x", y', '"say \\"x\\", y"'),
        ("", '""'),
        (" a", '" a"'),
        ('"a"', '"\\"a\\""'),
    ],
)
def test_values_are_quoted_only_where_they_must_be(value: str | float, written: str) -> None:
    assert render("", "", {"Key": value}) == f"Key: {written}"


def test_a_value_that_equals_its_key_is_still_a_pair() -> None:
    assert render("", "", {"Flag": "Flag"}) == "Flag: Flag"


def test_fields_in_any_order_come_out_in_the_order_of_a1111() -> None:
    shuffled = dict(sorted(GOLDEN_FIELDS.items(), reverse=True))
    extras = ["Lora hashes", "Hires upscaler", "Hires upscale", "Hires prompt"]
    base = [key for key in GOLDEN_FIELDS if key not in {*extras, "Version"}]
    assert list(ordered({"User": "me", **shuffled})) == [*base, *extras, "Version", "User"]


# reading


def test_a_full_infotext_is_read_field_by_field() -> None:
    parameters = parse(GOLDEN)
    assert parameters.prompt == GOLDEN_PROMPT
    assert parameters.negative_prompt == "fog,\npeople"
    assert parameters.fields == GOLDEN_FIELDS
    assert list(parameters.fields) == list(GOLDEN_FIELDS)
    assert parameters.raw == GOLDEN


def test_sizes_are_also_there_as_two_numbers() -> None:
    split = parse("cat\nSteps: 1, Size: 512x768, Hires resize: 0x0, Seed resize from: 1x2").split_fields
    assert split == {
        "Steps": 1,
        "Size-1": 512,
        "Size-2": 768,
        "Hires resize-1": 0,
        "Hires resize-2": 0,
        "Seed resize from-1": 1,
        "Seed resize from-2": 2,
    }


def test_fewer_than_three_pairs_belong_to_the_prompt() -> None:
    parameters = parse("cat\nSteps: 20, Seed: 1")
    assert parameters.prompt == "cat\nSteps: 20, Seed: 1"
    assert parameters.fields == {}


def test_a_line_after_the_fields_makes_them_prompt() -> None:
    assert parse("cat\nSteps: 20, Seed: 1, Sampler: Euler\njunk").fields == {}


def test_fields_without_any_prompt_are_read() -> None:
    parameters = parse("Steps: 20, Seed: 1, Sampler: Euler")
    assert parameters.prompt == ""
    assert parameters.fields == {"Steps": 20, "Seed": 1, "Sampler": "Euler"}


def test_blank_lines_inside_prompts_are_kept_and_one_before_the_fields_ends_the_negative_prompt() -> None:
    parameters = parse("\n\n a \n\n b\nNegative prompt: c\n\n d\n\nSteps: 20, Seed: 1, Sampler: Euler\n")
    assert parameters.prompt == "a\n\nb"
    assert parameters.negative_prompt == "c\n\nd\n"


def test_a_second_negative_line_is_appended() -> None:
    assert parse("a\nNegative prompt: b\nNegative prompt: c").negative_prompt == "b\nc"


def test_a_negative_prompt_may_start_on_the_next_line() -> None:
    assert parse("a\nNegative prompt:\nb").negative_prompt == "b"


def test_windows_line_ends_read_the_same() -> None:
    unix, windows = parse(GOLDEN), parse(GOLDEN.replace("\n", "\r\n"))
    assert (windows.prompt, windows.negative_prompt, windows.fields) == (unix.prompt, unix.negative_prompt, unix.fields)


def test_an_empty_text_has_nothing() -> None:
    parameters = parse("")
    assert (parameters.prompt, parameters.negative_prompt, parameters.fields) == ("", "", {})


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("Steps:20,Seed:1,CFG scale:7.0", {"Steps": 20, "Seed": 1, "CFG scale": 7.0}),
        ("Steps: 1, Steps: 2, Seed: 3", {"Steps": 2, "Seed": 3}),
        ("Steps: 1, Seed: , Size: 8x8, ", {"Steps": 1, "Size": "8x8"}),
        ('Steps: 1, Seed: 2, Hires prompt: ""', {"Steps": 1, "Seed": 2, "Hires prompt": ""}),
        ("x: 1, Steps: 1, Seed: 2, y: 3, RNG: CPU", {"Steps": 1, "Seed": 2, "RNG": "CPU"}),
        ("Steps: 1, Seed: 2, CFG (x): 3, RNG: CPU", {"Steps": 1, "Seed": 2, "RNG": "CPU"}),
        ("Schritte: 1, Größe: 2, 種: 3, 種類: 4", {"Schritte": 1, "Größe": 2, "種類": 4}),
        ('Steps: 1, Seed: 2, Odd: "a" b, End: 4', {"Steps": 1, "Seed": 2, "Odd": '"a" b', "End": 4}),
        ('Steps: 1, Seed: 2, Odd: "a, End: 4', {"Steps": 1, "Seed": 2, "Odd": '"a', "End": 4}),
        (r'Steps: 1, Seed: 2, Bad: "\x, y"', {"Steps": 1, "Seed": 2, "Bad": r'"\x, y"'}),
        (r'Steps: 1, Seed: 2, Half: "\ud800"', {"Steps": 1, "Seed": 2, "Half": r'"\ud800"'}),
        (r'Steps: 1, Seed: 2, Pair: "\ud83d\ude00"', {"Steps": 1, "Seed": 2, "Pair": "😀"}),
        ("Steps: 1, Flag, Seed: 2, RNG: CPU", {"Steps": 1, "Flag": None, "Seed": 2, "RNG": "CPU"}),
    ],
)
def test_lines_of_fields_are_read_as_a1111_reads_them(line: str, fields: dict[str, object]) -> None:
    assert fields_of(line) == {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("Steps: 30", 30),
        ("Seed: -1", -1),
        ("CFG scale: 7.0", 7.0),
        ("Extra noise: 1e-05", 1e-05),
        ("Tiling: True", True),
        ("Tiling: False", False),
        ("Mask: 007", "007"),
        ("Eta: 1e999", "1e999"),
        ("Eta: 1.5e+999", "1.5e+999"),
        ("Hires upscaler: 4", "4"),
        ("Model hash: 1234567890", "1234567890"),
        ("Model hash: 12345e6789", "12345e6789"),
        ("Lora hashes: 12", "12"),
        ("Model: 42", "42"),
        ("Version: 1.10", "1.10"),
        ('Eta: "5"', "5"),
        ("Seed: " + "9" * 5000, "9" * 5000),
    ],
)
def test_numbers_become_numbers_except_in_names_and_hashes(pair: str, value: object) -> None:
    key = pair.partition(":")[0]
    read = fields_of("Aaa: x, Bbb: y, " + pair)[key]
    assert (read, type(read)) == (value, type(value))


CIVITAI = (
    "cat\nSteps: 25, Sampler: Euler a, CFG scale: 7, Seed: 1, Clip skip: 2, "
    'Hashes: {"model": "abcdef0123", "lora:epic": "0123456789"}, '
    'Civitai resources: [{"type":"checkpoint","modelVersionId":128713},{"type":"lora","weight":0.7}], '
    "Civitai metadata: {}, Version: ComfyUI"
)


def test_unquoted_json_of_civitai_stays_whole() -> None:
    fields = parse(CIVITAI).fields
    assert json.loads(str(fields["Hashes"])) == {"model": "abcdef0123", "lora:epic": "0123456789"}
    assert json.loads(str(fields["Civitai resources"]))[1] == {"type": "lora", "weight": 0.7}
    assert fields["Civitai metadata"] == "{}"
    assert "lora" not in fields
    assert fields["Version"] == "ComfyUI"


def test_brackets_that_are_no_json_are_read_to_the_comma() -> None:
    assert fields_of("Steps: 1, Seed: 2, Odd: {a, Odder: [1] x, End: 5") == {
        "Steps": 1,
        "Seed": 2,
        "Odd": "{a",
        "Odder": "[1] x",
        "End": 5,
    }


HOSTILE = {
    "one long word": "a" * 1_000_000,
    "words without pairs": "ab(" * 300_000,
    "words and spaces": "a " * 500_000 + "!",
    "open quotes": 'kk: "' * 200_000,
    "escaped quotes": 'kk: "' + '\\"' * 500_000,
    "quotes that never end": 'kk: "x, ' * 120_000,
    "spaces after quotes": ('kk: "x"' + " " * 500) * 2_000,
    "spaces after colons": ("kk:" + " " * 500) * 2_000,
    "deep JSON": "kk: " + "[" * 500_000,
    "many deep JSONs": ("kk: " + "[" * 2_000 + ", ") * 400,
    "long JSONs that fail": ("kk: [" + "1," * 500) * 1_000,
    "JSON that never ends": "kk: [x, " * 120_000,
    "JSON with half of a string": 'kk: [a", ' * 120_000,
    "JSON that is none": "kk: [[a]], " * 90_000,
    "JSON in JSON that is none": "kk: [" * 5 + "1, " * 300_000 + "]" * 5,
    "JSON strings that never end": 'kk: ["\\\\", ' * 80_000,
    "colons": ":" * 1_000_000,
    "commas": "kk: 1, " + "," * 1_000_000,
    "lines": "\n" * 500_000 + "Negative prompt:\n" * 40_000,
    "digits": "kk: " + "9" * 1_000_000,
    "quotes and commas": 'kk: ",' * 160_000,
    "LoRAs that never end": "LoRAs:a:1" + ",LoRAs:1:1" * 90_000 + "x",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.timeout(20)
def test_a_million_hostile_characters_take_no_quadratic_time(text: str) -> None:
    parse(f"cat\n{text}")


# what A1111 fills in


def test_left_out_fields_have_the_value_that_this_means() -> None:
    fields = restored(parse("cat\nSteps: 20, Seed: 1, Size: 512x768")).fields
    assert (fields["Size-1"], fields["Size-2"]) == (512, 768)
    assert "Size" not in fields
    assert fields["Clip skip"] == 1
    assert fields["RNG"] == "GPU"
    assert fields["Schedule type"] == "Automatic"
    assert fields["Hires resize-1"] == 0
    assert fields["Mask mode"] == "Inpaint masked"
    assert fields["Refiner switch by sampling steps"] is False
    assert "Emphasis" not in fields
    assert "Cache FP16 weight for LoRA" not in fields


def test_what_is_written_goes_before_what_is_meant() -> None:
    fields = restored(parse("cat\nSteps: 20, Seed: 1, RNG: CPU, Clip skip: 2, FP8 weight: Enable")).fields
    assert (fields["RNG"], fields["Clip skip"], fields["Cache FP16 weight for LoRA"]) == ("CPU", 2, False)


@pytest.mark.parametrize(
    ("prompt", "weighted"), [("(cat:1.2)", True), ("[cat]", True), (r"\(cat\)", False), ("", False)]
)
def test_emphasis_is_original_only_where_a_prompt_has_weights(prompt: str, weighted: bool) -> None:
    line = "Steps: 20, Seed: 1, RNG: CPU"
    assert ("Emphasis" in restored(parse(f"{prompt}\n{line}")).fields) is weighted
    assert ("Emphasis" in restored(parse(f"x\nNegative prompt: {prompt}\n{line}")).fields) is weighted


def test_hypernetworks_move_into_the_prompt() -> None:
    parameters = restored(parse("cat\nSteps: 20, Seed: 1, Hypernet: anime, Hypernet strength: 0.5"))
    assert parameters.prompt == "cat<hypernet:anime:0.5>"


@pytest.mark.parametrize(
    ("first", "size"), [("512x640", (512, 640)), ("0x0", (512, 512)), ("0x512", (512, 512)), ("odd", (1024, 1024))]
)
def test_first_pass_size_of_2022_becomes_size(first: str, size: tuple[int, int]) -> None:
    fields = restored(parse(f"cat\nSteps: 20, Seed: 1, Size: 1024x1024, First pass size: {first}")).fields
    assert (fields["Size-1"], fields["Size-2"]) == size
    assert fields["Hires resize-1"] == (0 if first == "odd" else 1024)


def test_first_pass_size_is_rounded_up_to_64() -> None:
    fields = restored(parse("cat\nSteps: 20, Seed: 1, Size: 1000x1504, First pass size: 0x0")).fields
    assert (fields["Size-1"], fields["Size-2"]) == (448, 640)


@pytest.mark.parametrize(
    ("version", "old_editing", "pad_conds", "downcast", "refiner"),
    [
        ("v1.5.2", True, True, True, True),
        ("1.6.0", False, False, True, True),
        ("v1.7.0", False, False, True, True),
        ("v1.7.0-225-gabcdef0", False, False, False, True),
        ("v1.8.0", False, False, False, False),
        ("v1.10.1", False, False, False, False),
        ("f2.0.1v1.10.1-previous-1-gabc", False, False, False, False),
        ("DiffusionAPI v1.0.0", False, False, False, False),
    ],
)
def test_old_versions_bring_their_old_behaviour(
    version: str, old_editing: bool, pad_conds: bool, downcast: bool, refiner: bool
) -> None:
    fields = restored(parse(f"[a:b:0.5]\nSteps: 20, Sampler: DDIM, Refiner: r, Version: {version}")).fields
    assert fields.get("Old prompt editing timelines", False) is old_editing
    assert fields.get("Pad conds v0", False) is pad_conds
    assert fields.get("Downcast alphas_cumprod", False) is downcast
    assert fields["Refiner switch by sampling steps"] is refiner


# NovelAI


def test_novelai_settings_are_told_in_the_words_of_a1111() -> None:
    comment = json.dumps({"uc": "dog", "steps": 28, "scale": 11.0, "seed": 7, "sampler": "k_dpmpp_2m", "noise": 0.2})
    assert from_novelai("cat", comment, width=512, height=768) == (
        "cat\nNegative prompt: dog\nSteps: 28, Sampler: DPM++ 2M, CFG scale: 11, Seed: 7, Size: 512x768, Clip skip: 2, "
        "ENSD: 31337"
    )


def test_an_unknown_novelai_sampler_is_euler_a() -> None:
    text = from_novelai("cat", '{"steps": 1, "sampler": ["odd"]}', width=8, height=8)
    assert text is not None
    assert parse(text).fields["Sampler"] == "Euler a"


@pytest.mark.parametrize("comment", ["", "{", "[]", "null", "[" * 100_000, '{"a": ' * 100_000])
def test_broken_novelai_settings_are_none(comment: str) -> None:
    assert from_novelai("cat", comment, width=8, height=8) is None


def test_a_novelai_text_can_always_be_encoded() -> None:
    text = from_novelai("cat", r'{"uc": "\ud800", "seed": {"a": [1]}}', width=8, height=8)
    assert text is not None
    assert text.encode()


# there and back

NUMBER_LIKE = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?|True|False")

lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")).filter(
    lambda line: line == line.strip() and not line.startswith("Negative prompt:")
)
prompts = st.lists(lines, max_size=4).map("\n".join).filter(lambda prompt: prompt == prompt.strip())
keys = st.from_regex(r"[A-Za-z0-9é猫_][A-Za-z0-9é猫_ \-/]{0,12}[A-Za-z0-9é猫_\-/]", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: not NUMBER_LIKE.fullmatch(text))
numbers = st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()


def has_text_key(fields: dict[str, object]) -> bool:
    words = "hash hashes model checkpoint vae refiner sampler scheduler upscaler version user name prompt".split()
    return any(key.lower().split()[-1] in words for key in fields)


@given(prompts, prompts, st.dictionaries(keys, texts | numbers, min_size=3, max_size=8))
@example("", "", {"aa": "", "bb": '"', "cc": "[1"})
@example("a\n\nb", "c", {"aa": "\r", "bb": "{}", "cc": "\x85"})
def test_what_is_written_reads_back_the_same(
    prompt: str, negative_prompt: str, fields: dict[str, str | int | float | None]
) -> None:
    assume(not has_text_key(dict(fields)))
    parameters = parse(render(prompt, negative_prompt, fields))
    assert parameters.prompt == prompt
    assert parameters.negative_prompt == negative_prompt
    assert parameters.fields == fields
    assert list(parameters.fields) == list(fields)


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    parameters = parse(text)
    assert parameters.raw == text
    restored(parameters)
    asked(parameters)
    hashes(parameters)


PIECES = [
    *'ab:,"\\[]{}\n 1x.-e', "Steps: 1, Seed: 2, Size: 8x8, ", "LoRAs: ", "Lora hashes: ", "Hashes: ", "Model: ", "Model hash: ",
    "Hires upscale: ", "VAE: ", "RNG: ", "Emphasis: ", '{"model": 1}', "lora:", "[0123456789]",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_of_the_fields_that_name_files_asks_for_something(text: str) -> None:
    for parameters in (parse(text), parse("Steps: 1, Seed: 2, Size: 8x8, LoRAs: " + text)):
        fields, unused = asked(parameters)
        assert {"prompt", "negative_prompt", "rng", "schedule"} <= fields.keys()
        assert set(unused) <= parameters.fields.keys()
        assert all(isinstance(value, str) for value in hashes(parameters).values())


USES = st.builds(
    LoraUse,
    name=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1),
    scale=st.floats(-100, 100),
    text_scale=st.none() | st.floats(-100, 100),
)


@given(st.lists(USES, min_size=1, max_size=4))
@example([LoraUse(name='a, b: "c"', scale=1e-7), LoraUse(name='"', scale=-0.0, text_scale=100.0)])
def test_loras_with_any_name_and_strength_are_asked_for_again(uses: list[LoraUse]) -> None:
    request = REQUEST.model_copy(update={"loras": tuple(uses)})
    text = for_request(
        request, sampler_label="Euler a", schedule_label="Karras", model_name="m", model_hash=None, version="v1"
    )
    found = [LoraUse(**use) for use in asked(parse(text))[0]["loras"]]
    assert [(use.name, use.scale, use.on_text) for use in found] == [(u.name, u.scale, u.on_text) for u in uses]


@pytest.mark.parametrize("told", ["a:1.2.3", "a:.", "a:-", "a:1:2:3", "a:1e999", "a:nan"])
def test_strengths_that_are_no_numbers_ask_for_no_lora(told: str) -> None:
    assert "loras" not in asked(parse(f"Steps: 1, Seed: 2, Size: 8x8, LoRAs: {told}"))[0]


def test_the_hashes_of_files_are_found_wherever_a_text_has_them() -> None:
    line = (
        "Steps: 1, Seed: 2, Model hash: 0123456789, Model: dream, VAE hash: abcdef0123, VAE: kl.pt, "
        'Lora hashes: "epic: 12ab, a.b: 34cd", Hashes: {"model": "ffffffffff", "lora:epic": "eeee", "lora:old": "dddd", '
        '"vae": "cccc", "upscaler:x": "bbbb"}'
    )
    assert hashes(parse(line)) == {
        ("model", "dream"): "0123456789",
        ("vae", "kl.pt"): "abcdef0123",
        ("lora", "epic"): "12ab",
        ("lora", "a.b"): "34cd",
        ("lora", "old"): "dddd",
        ("upscaler", "x"): "bbbb",
    }
    assert hashes(parse("Steps: 1, Seed: 2, Model hash: 0123abcd")) == {("model", ""): "0123abcd"}


@pytest.mark.parametrize(
    ("told", "name", "hashed"),
    [
        ("dream [0123456789]", "dream", "0123456789"),
        ("dream v2 [final] [0123ABCD]", "dream v2 [final]", "0123ABCD"),
        ("dream [final]", "dream [final]", None),
        ("[0123456789]", "[0123456789]", None),
        ("", "", None),
    ],
)
def test_a_name_may_have_its_hash_in_brackets(told: str, name: str, hashed: str | None) -> None:
    assert named(told) == (name, hashed)


def test_a_text_that_knows_a_model_by_its_hash_alone_asks_for_it() -> None:
    assert asked(parse("Steps: 1, Seed: 2, Model hash: 0123abcd"))[0]["model"] == ""
    assert "model" not in asked(parse("Steps: 1, Seed: 2, Size: 8x8"))[0]


def test_forges_and_civitais_texts_are_read() -> None:
    forge = (
        "cat\nSteps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 1, "
        "Size: 896x1152, "
        "Model hash: b4a2fdb95a, Model: flux1-dev, Module 1: ae, Module 2: clip_l, Diffusion in Low Bits: Automatic, "
        "Version: f2.0.1v1.10.1-previous-659-gc055f2d4"
    )
    fields, unused = asked(parse(forge))
    assert (fields["model"], fields["sampler"], fields["guidance_scale"]) == ("flux1-dev", "Euler", 3.5)
    assert unused == ("Module 1", "Module 2", "Diffusion in Low Bits")
    fields, unused = asked(parse(forge.replace("CFG scale: 1,", "CFG scale: 4,")))
    assert (fields["guidance_scale"], unused[0]) == (4, "Distilled CFG Scale")
    fields, unused = asked(parse(CIVITAI))
    assert (fields["seed"], fields["clip_skip"]) == (1, 2)
    assert unused == ("Civitai resources", "Civitai metadata")


@given(st.lists(st.sampled_from([*'ab:,"\\[]{}\n 1x', "Size: ", "Negative prompt:", "kk: "])).map("".join))
def test_any_text_of_the_grammars_own_pieces_can_be_read_and_completed(text: str) -> None:
    restored(parse("First pass size: 0x0, Size: 0x0, " + text))


def test_what_is_read_from_a_full_infotext_writes_the_same_text_again() -> None:
    parameters = parse(GOLDEN)
    assert render(parameters.prompt, parameters.negative_prompt, parameters.fields) == GOLDEN


# the manual


def test_the_examples_of_the_manual_print_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manual = (Path(__file__).parents[1] / "METADATA_README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", manual, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == expected
    assert len(examples) == 5


def test_the_manual_shows_what_the_service_writes() -> None:
    manual = (Path(__file__).parents[1] / "METADATA_README.md").read_text(encoding="utf-8")
    shown = re.search(r"## The text\n\n```text\n(.*?)\n```", manual, re.DOTALL)
    assert shown
    request = REQUEST.model_copy(
        update={
            "prompt": "a lighthouse on a cliff, (stormy sea:1.2)",
            "negative_prompt": "people, text",
            "height": 768,
        }
    )
    text = for_request(
        request,
        sampler_label="Euler a",
        schedule_label="Karras",
        model_name="tiny",
        model_hash="abcdef0123",
        version="DiffusionAPI v0.1.0",
    )
    assert shown[1] == text


def test_the_manual_names_every_field_that_is_written() -> None:
    manual = (Path(__file__).parents[1] / "METADATA_README.md").read_text(encoding="utf-8")
    table = manual[manual.index("## What is written") :]
    named = ", ".join(re.findall(r"^\| ([A-Z][\w ,]+?)(?: \(.*\))? \|", table, re.MULTILINE)).split(", ")
    again = Hires(
        upscaler="4x", width=1000, height=1000, steps=3, strength=0.5, sampler="euler", schedule="simple", model="other",
        prompt="b", negative_prompt="c",
    )  # fmt: skip
    mask = Mask(image="0", invert=True, only_masked=True)
    drawn = dict(FULL) | {
        "loras": (LoraUse(name="epic"),), "refiner": Refiner(model="r", switch_at=0.8), "tiling": True
    }  # fmt: skip
    common = {key: value for key, value in drawn.items() if key not in ("kind", "hires")}
    requests = [
        FULL.model_copy(update=drawn | {"hires": again}),
        FULL.model_copy(update={"hires": again.model_copy(update={"width": 1024, "height": 1280})}),
        Img2Img(**common, image="0", strength=0.5, resize_mode="crop and resize", noise_multiplier=0.9, mask=mask),
    ]
    known = {"VAE hash": "0", "VAE": "kl-f8", "Lora hashes": "epic: 0", "TI hashes": "bad: 0"}
    texts = [
        for_request(
            request, sampler_label="Euler a", schedule_label="Karras", model_name="m", model_hash="abcdef0123", known=known,
            version="v",
        )
        for request in requests
    ]  # fmt: skip
    texts.append(for_upscale(Upscale(image="0", upscaler="4x", width=8, height=8, output=Output()), version="v"))
    assert sorted(named) == sorted({key for text in texts for key in parse(text).fields})
