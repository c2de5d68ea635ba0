from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import resource
import struct
import sys
import time
import zlib
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from diffusion_api.errors import InvalidImage, TooLarge
from diffusion_api.images import (
    MAX_SIDE,
    Format,
    decode,
    encode,
    from_base64,
    read_infotext,
    read_metadata,
    sanitized,
)
from diffusion_api.infotext import render

FORMATS: tuple[Format, ...] = ("png", "jpeg", "webp", "avif", "gif")
EXIF_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")
LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"
LATIN = f"a café\nNegative prompt: dog\n{LINE}"
WIDE = f"猫 🐈 café\nNegative prompt: dog\n{LINE}"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")


def picture(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A smooth picture with every colour channel different."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1).astype(np.uint8)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def told(data: bytes) -> tuple[str | None, Mapping[str, str]]:
    found = read_metadata(data)
    return found.infotext, found.items


def plain() -> Image.Image:
    return Image.fromarray(picture())


def exif_with(comment: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def png_texts(**texts: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return info


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_zeros(width: int, height: int, *, bytes_of_pixels: int) -> bytes:
    """A greyscale PNG that announces a size and holds (the start of) its pixels, all black."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(bytes_of_pixels), 9)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# encoding


@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_pillow_reads_back_the_same_pixels_from_a_png(pixels: NDArray[np.uint8]) -> None:
    image = opened(encode(pixels, format="png", quality=1, infotext=None))
    image.load()
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (513, 511), (1024, 1024)])
def test_a_png_of_any_shape_is_lossless_for_noise(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(opened(encode(pixels, format="png", quality=1, infotext=LATIN))), pixels)


def test_a_png_of_a_view_into_a_larger_picture_is_lossless() -> None:
    pixels = picture(100, 100)[10:90:2, ::-1, ::-1]
    assert np.array_equal(np.asarray(opened(encode(pixels, format="png", quality=1, infotext=None))), pixels)


def test_a_png_is_sound_chunk_by_chunk() -> None:
    opened(encode(picture(), format="png", quality=1, infotext=WIDE)).verify()


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_picture_gives_the_same_bytes(format: Format) -> None:
    first, second = (encode(picture(), format=format, quality=80, infotext=WIDE) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_what_pillow_says_it_is_and_looks_the_same(format: Format) -> None:
    image = opened(encode(picture(), format=format, quality=90, infotext=None))
    assert image.format == format.upper()
    assert image.size == (64, 48)
    difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - picture())
    assert difference.mean() < 6


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_a_lower_quality_makes_a_smaller_file(format: Format) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    low, high = (encode(noise, format=format, quality=quality, infotext=None) for quality in (20, 95))
    assert len(low) < len(high) / 2


def test_a_jpeg_is_optimised() -> None:
    data = encode(picture(), format="jpeg", quality=85, infotext=None)
    assert data == saved(plain(), "JPEG", quality=85, optimize=True)
    assert len(data) < len(saved(plain(), "JPEG", quality=85))


def test_a_jpeg_of_noise_at_full_quality_can_be_written() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    opened(encode(noise, format="jpeg", quality=100, infotext=WIDE)).load()


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif", "gif"])
def test_a_side_too_long_for_the_format_is_refused_with_the_limit(format: Format) -> None:
    with pytest.raises(TooLarge, match=str(MAX_SIDE[format])):
        encode(np.zeros((1, MAX_SIDE[format] + 1, 3), np.uint8), format=format, quality=80, infotext=None)


@pytest.mark.parametrize("format", ["jpeg", "webp", "gif"])
def test_the_longest_side_of_each_format_can_be_written(format: Format) -> None:
    data = encode(np.zeros((1, MAX_SIDE[format], 3), np.uint8), format=format, quality=80, infotext=None)
    assert decode(data, max_pixels=100_000).size == (MAX_SIDE[format], 1)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 4, 4), (4, 4, 1)])
def test_what_is_no_rgb_picture_is_a_mistake_of_the_program(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="height, width, 3"):
        encode(np.zeros(shape, np.uint8), format="png", quality=80, infotext=None)


# where the infotext is stored


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", [LATIN, WIDE, f'line\n"quoted", \t {LINE}', "x" * 5000 + LINE])
def test_the_infotext_reads_back_from_every_format(format: Format, text: str) -> None:
    data = encode(picture(), format=format, quality=80, infotext=text)
    assert read_infotext(data) == text


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", [None, ""])
def test_without_an_infotext_there_is_none(format: Format, text: str | None) -> None:
    assert told(encode(picture(), format=format, quality=80, infotext=text)) == (None, {})


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
)
def test_any_prompt_reads_back_from_every_format(format: Format, prompt: str) -> None:
    text = render(prompt, "", {"Steps": 20, "Sampler": "Euler a", "Schedule type": "Karras", "CFG scale": 7, "Seed": 1})
    assert read_infotext(encode(picture(8, 8), format=format, quality=80, infotext=text)) == text


def test_a_latin1_infotext_is_a_text_chunk_of_a_png() -> None:
    data = encode(picture(), format="png", quality=1, infotext=LATIN)
    assert png_chunk(b"tEXt", b"parameters\0" + LATIN.encode("latin-1")) in data
    assert opened(data).info["parameters"] == LATIN


def test_a_wider_infotext_is_an_international_text_chunk_of_a_png() -> None:
    data = encode(picture(), format="png", quality=1, infotext=WIDE)
    assert png_chunk(b"iTXt", b"parameters\0\0\0\0\0" + WIDE.encode()) in data
    assert opened(data).info["parameters"] == WIDE


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_the_exif_comment_is_big_endian_utf16_without_a_mark(format: Format) -> None:
    image = opened(encode(picture(), format=format, quality=80, infotext=WIDE))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment == b"UNICODE\0" + WIDE.encode("utf-16-be")


def test_the_exif_of_a_jpeg_is_these_bytes() -> None:
    data = encode(picture(), format="jpeg", quality=80, infotext="Aé")
    tiff = (
        b"MM\0*\0\0\0\x08"
        + b"\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x1a\0\0\0\0"  # first directory: where the Exif directory is
        + b"\0\x01\x92\x86\0\x07\0\0\0\x0c\0\0\0\x2c\0\0\0\0"  # Exif directory: UserComment, undefined, 12 bytes
        + b"UNICODE\0\0A\0\xe9"
    )
    found = data[data.index(b"MM\0*") :][: len(tiff)]
    # Pillow may write the type as BYTE; readers take the bytes either way.
    assert found in (tiff, tiff.replace(b"\x92\x86\0\x07", b"\x92\x86\0\x01"))


def test_the_comment_of_a_gif_is_utf8() -> None:
    text = WIDE * 20
    assert opened(encode(picture(), format="gif", quality=1, infotext=text)).info["comment"] == text.encode()


def test_an_infotext_too_long_for_a_jpeg_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = encode(picture(), format="jpeg", quality=80, infotext="x" * 33_000)
    opened(data).load()
    assert read_infotext(data) is None
    assert "33000 characters" in caplog.text


@pytest.mark.parametrize("format", FORMATS)
def test_halves_of_surrogate_pairs_and_nul_do_not_lose_a_picture(format: Format) -> None:
    data = encode(picture(), format=format, quality=80, infotext=f"a\ud800b\0c\ud83d\ude00\n{LINE}")
    assert read_infotext(data) == f"a\ufffdbc😀\n{LINE}"


# reading what others wrote


@pytest.mark.parametrize("format", EXIF_FORMATS)
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + WIDE.encode("utf-16-be"),
        b"UNICODE\0" + WIDE.encode("utf-16-le"),
        b"UNICODE\0" + WIDE.encode("utf-16"),
        b"UNICODE\0" + b"\xfe\xff" + WIDE.encode("utf-16-be"),
        b"UNICODE\0" + WIDE.encode("utf-16-le") + b"\0\0\0",
        b"Unicode\0" + WIDE.encode("utf-16-be"),
        b"ASCII\0\0\0" + WIDE.encode(),
        b"\0" * 8 + WIDE.encode(),
        WIDE.encode(),
        WIDE.encode() + b"\xff\xfe",
    ],
    ids=[
        "BE",
        "LE",
        "LE with mark",
        "BE with mark",
        "padded",
        "lower case",
        "ASCII",
        "undefined",
        "bare",
        "bare broken",
    ],
)
def test_exif_comments_of_every_kind_are_read(format: str, comment: bytes) -> None:
    assert read_infotext(saved(plain(), format, exif=exif_with(comment))) == WIDE


def test_a_japanese_exif_comment_is_read() -> None:
    comment = b"JIS\0\0\0\0\0" + "猫".encode("shift_jis")
    assert read_infotext(saved(plain(), "JPEG", exif=exif_with(comment))) == "猫"


def test_a_little_endian_exif_block_is_read() -> None:
    text = b"UNICODE\0" + LATIN.encode("utf-16-be")
    block = (
        b"Exif\0\0II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<HHHIII", 1, 0x8769, 4, 1, 26, 0)
        + struct.pack("<HHHIII", 1, 0x9286, 7, len(text), 44, 0)
        + text
    )
    assert read_infotext(saved(plain(), "JPEG", exif=block)) == LATIN


def test_exif_goes_before_the_text_of_a_png() -> None:
    data = saved(plain(), "PNG", pnginfo=png_texts(parameters="old"), exif=exif_with(b"ASCII\0\0\0new"))
    assert told(data) == ("new", {})


@pytest.mark.parametrize("comment", [b"", b"UNICODE\0", b"ASCII\0\0\0\0\0", b"ASCII\0\0\0  "])
def test_an_empty_exif_comment_leaves_the_text_of_a_png(comment: bytes) -> None:
    data = saved(plain(), "PNG", pnginfo=png_texts(parameters="old"), exif=exif_with(comment))
    assert read_infotext(data) == "old"


def test_a_jpeg_comment_counts_without_exif_and_only_then() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    assert read_infotext(saved(plain(), "JPEG", comment=LATIN.encode())) == LATIN
    assert read_infotext(saved(plain(), "JPEG", comment=LATIN.encode(), exif=exif)) is None


def test_compressed_and_other_texts_of_a_png_are_read() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", LATIN, zip=True)
    info.add_itxt("Title", "猫", zip=True)
    data = saved(plain(), "PNG", pnginfo=info, dpi=(72, 72))
    assert told(data) == (LATIN, {"Title": "猫"})


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_and_the_size_are_told_without_decoding(format: Format) -> None:
    whole = encode(picture(), format=format, quality=80, infotext=LATIN)
    found = read_metadata(whole[: len(whole) * 9 // 10] if format in ("png", "jpeg") else whole)
    assert (found.format, found.width, found.height, found.infotext) == (format, 64, 48, LATIN)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_that_is_told_is_that_of_the_upright_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(plain(), "JPEG", exif=exif)
    found = read_metadata(data)
    assert (found.width, found.height) == decode(data, max_pixels=10**5).size


def test_a_comfyui_picture_has_items_and_no_infotext() -> None:
    workflow = json.dumps({"1": {"class_type": "KSampler"}})
    data = saved(plain(), "PNG", pnginfo=png_texts(prompt=workflow, workflow="{}"))
    assert told(data) == (None, {"prompt": workflow, "workflow": "{}"})


def test_a_novelai_picture_is_told_in_the_words_of_a1111() -> None:
    comment = json.dumps({"uc": "dog", "steps": 28, "scale": 11, "seed": 7, "sampler": "k_euler_ancestral"})
    info = png_texts(Software="NovelAI", Description="cat", Comment=comment)
    found, items = told(saved(plain(), "PNG", pnginfo=info))
    assert found == (
        "cat\nNegative prompt: dog\nSteps: 28, Sampler: Euler a, CFG scale: 11, Seed: 7, Size: 64x48, "
        "Clip skip: 2, ENSD: 31337"
    )
    assert items == {"Software": "NovelAI", "Description": "cat", "Comment": comment}


@pytest.mark.parametrize("comment", ["", "{", "[1]", '{"steps": {}}'])
def test_a_broken_novelai_picture_is_still_read(comment: str) -> None:
    _, items = told(saved(plain(), "PNG", pnginfo=png_texts(Software="NovelAI", Comment=comment)))
    assert items["Software"] == "NovelAI"


def test_texts_named_like_technical_entries_do_no_harm() -> None:
    data = saved(plain(), "PNG", pnginfo=png_texts(exif="x", comment="y", dpi="z", parameters=LATIN))
    assert told(data) == (LATIN, {"comment": "y"})


@pytest.mark.parametrize(
    "block",
    [
        b"junk",
        b"MM",
        b"MM\0*\0\0\0\x08",
        b"MM\0*\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff",
        exif_with(b"UNICODE\0" + LATIN.encode("utf-16-be"))[:40],
        exif_with(b"x" * 20).replace(b"\0\0\0\x14", b"\xff\xff\xff\xff"),
    ],
)
def test_broken_exif_is_passed_over(block: bytes) -> None:
    data = saved(plain(), "JPEG", exif=b"Exif\0\0" + block.removeprefix(b"Exif\0\0"))
    read_metadata(data)
    assert np.asarray(decode(data, max_pixels=10_000)).shape == (48, 64, 3)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80).map(lambda tail: b"Exif\0\0MM\0*\0\0\0\x08" + tail) | st.binary(min_size=1, max_size=80))
def test_any_bytes_for_exif_leave_the_picture_readable(block: bytes) -> None:
    data = encode(picture(8, 8), format="png", quality=1, infotext=LATIN)
    at = data.index(b"IDAT") - 4
    data = data[:at] + png_chunk(b"eXIf", block.removeprefix(b"Exif\0\0")) + data[at:]
    read_metadata(data)
    decode(data, max_pixels=100)


def test_an_infotext_of_the_real_webui_is_found_whatever_else_is_there() -> None:
    exif = exif_with(b"UNICODE\0" + WIDE.encode("utf-16-be"))
    for format in EXIF_FORMATS:
        assert told(saved(plain(), format, exif=exif, icc_profile=b"x" * 200)) == (WIDE, {})


# decoding


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_of_every_format_is_decoded(format: Format) -> None:
    data = encode(picture(), format=format, quality=90, infotext=None)
    assert np.array_equal(np.asarray(decode(data, max_pixels=64 * 48)), np.asarray(opened(data)))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(plain(), format, exif=exif)
    assert np.array_equal(
        np.asarray(decode(data, max_pixels=10_000)), np.asarray(ImageOps.exif_transpose(opened(data)))
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_upright_as_its_container_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(plain(), "AVIF", exif=exif.tobytes())
    assert np.array_equal(
        np.asarray(decode(data, max_pixels=10_000)), np.asarray(ImageOps.exif_transpose(opened(data)))
    )


def test_only_the_first_frame_of_an_animation_is_decoded() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "AVIF", "PNG"):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
        assert opened(data).n_frames == 3
        image = decode(data, max_pixels=256)
        red, green, blue = image.convert("RGB").getpixel((8, 8))
        assert (red > 240, green < 15, blue < 15) == (True, True, True), format
        assert not hasattr(image, "n_frames")


def test_transparency_is_kept() -> None:
    image = Image.new("RGBA", (8, 8), (1, 2, 3, 4))
    assert decode(saved(image, "PNG"), max_pixels=64).getpixel((0, 0)) == (1, 2, 3, 4)


def test_sixteen_bits_become_eight() -> None:
    image = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16))
    decoded = decode(saved(image, "PNG"), max_pixels=5)
    assert decoded.mode == "L"
    assert list(decoded.tobytes()) == [0, 0, 1, 128, 255]


def test_a_picture_beyond_the_limit_is_refused_with_both_sizes() -> None:
    with pytest.raises(TooLarge, match=r"64x48.*3071"):
        decode(encode(picture(), format="png", quality=1, infotext=None), max_pixels=3071)


def test_a_small_file_of_two_thousand_million_pixels_is_refused() -> None:
    bomb = png_of_zeros(46_340, 46_340, bytes_of_pixels=30_000_000)
    assert len(bomb) < 31_000
    for refuse in (lambda: decode(bomb, max_pixels=2**40), lambda: read_metadata(bomb)):
        with pytest.raises(TooLarge):
            refuse()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_beyond_the_limit_takes_no_memory(format: str) -> None:
    side = 12_000
    if format == "PNG":
        bomb = png_of_zeros(side, side, bytes_of_pixels=1000)
    else:
        small = saved(Image.new("L", (16, 16)), format)
        bomb = resized_header(small, format, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooLarge, match="12000x12000"):
        decode(bomb, max_pixels=10_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def film(format: str, frames: int) -> bytes:
    """An animation of that many frames, made without a codec: one frame's bytes again and again."""
    tiny = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    data = saved(tiny[0], format, save_all=True, append_images=tiny[1:], duration=10)
    if format == "GIF":
        at = data.rindex(b"\x21\xf9")  # the graphic control extension before the last frame
        return data[:at] + data[at:-1] * frames + b";"
    at = data.rindex(b"ANMF")
    body = data[8:at] + data[at:] * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_a_film_of_a_hundred_thousand_frames_costs_its_first(format: str) -> None:
    def seconds(data: bytes) -> float:
        began = time.process_time()
        assert decode(data, max_pixels=256).convert("RGB").getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=15)
        read_metadata(data)
        return time.process_time() - began

    long = film(format, 100_000)
    assert len(long) > 5_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = min(seconds(long) for _ in range(3))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000
    assert took < 1000 * (min(seconds(film(format, 1)) for _ in range(3)) + 0.001)


@pytest.mark.parametrize(
    "tail", [b"<script>alert(1)</script>", b"PK\x03\x04evil", b"%PDF-1.4 evil", b"#!/bin/sh\nevil"]
)
def test_what_hangs_on_a_picture_is_not_passed_on(tail: bytes) -> None:
    for format in FORMATS:
        file = encode(picture(), format=format, quality=80, infotext=None) + tail
        again = encode(
            np.asarray(decode(file, max_pixels=10_000).convert("RGB")), format="png", quality=1, infotext=None
        )
        assert tail not in again
    with pytest.raises(InvalidImage):
        decode(tail + encode(picture(), format="png", quality=1, infotext=None), max_pixels=10_000)


def test_what_a_picture_says_of_its_maker_is_not_passed_on() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera of Jane"
    for format in EXIF_FORMATS:
        decoded = decode(saved(plain(), format, exif=exif), max_pixels=10_000)
        again = encode(np.asarray(decoded.convert("RGB")), format="jpeg", quality=80, infotext=None)
        assert b"Jane" not in again


def resized_header(data: bytes, format: str, side: int) -> bytes:
    """The file with another size in its header."""
    changed = bytearray(data)
    if format == "GIF":
        changed[6:10] = struct.pack("<HH", side, side)
    elif format == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        changed[at : at + 4] = struct.pack(">HH", side, side)
    else:
        at = data.index(b"\x9d\x01\x2a") + 3
        changed[at : at + 4] = struct.pack("<HH", side, side)
    return bytes(changed)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_a_file_cut_short_is_refused(format: Format, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, format=format, quality=90, infotext=None)
    with pytest.raises(InvalidImage):
        decode(data[: int(len(data) * part)], max_pixels=10_000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"<html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        saved(plain(), "BMP"),
        saved(plain(), "TIFF"),
        saved(plain(), "PPM"),
        saved(plain(), "ICO"),
        bytes(100_000),
    ],
)
def test_other_kinds_of_files_are_refused_with_the_kinds_that_are_accepted(data: bytes) -> None:
    for refuse in (lambda: decode(data, max_pixels=10_000), lambda: read_metadata(data)):
        with pytest.raises(InvalidImage, match="PNG, JPEG, WebP, GIF or AVIF"):
            refuse()


def test_a_text_chunk_that_swells_is_refused() -> None:
    data = encode(picture(8, 8), format="png", quality=1, infotext=None)
    at = data.index(b"IDAT") - 4
    swelling = png_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(50_000_000), 9))
    with pytest.raises(InvalidImage):
        read_metadata(data[:at] + swelling + data[at:])


ENCODED = {format: encode(picture(), format=format, quality=80, infotext=WIDE) for format in FORMATS}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6))
def test_damage_of_any_kind_is_a_picture_or_a_refusal(format: Format, changes: list[tuple[float, int]]) -> None:
    data = bytearray(ENCODED[format])
    for place, value in changes:
        data[int(place * len(data))] = value
    for read in (lambda: decode(bytes(data), max_pixels=100_000), lambda: read_metadata(bytes(data))):
        with contextlib.suppress(InvalidImage, TooLarge):
            read()


# base64


@given(st.binary(min_size=1))
def test_base64_and_data_urls_give_the_bytes(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    wrapped = base64.encodebytes(data).decode().replace("\n", "\r\n ")
    for form in (
        text,
        f" {text}\n",
        wrapped,
        text.rstrip("="),
        f"data:image/png;base64,{text}",
        f"DATA:;BASE64,{wrapped}",
    ):
        assert from_base64(form, max_bytes=len(data), field="image") == data


@pytest.mark.parametrize(
    "text",
    [
        "invalid_base64_data",
        "a",
        "aaaaa",
        "aa=a",
        "ab\u00e9d",
        "http://example.org/cat.png",
        "data:image/png;base64,*",
        "\ud800" * 4,
    ],
)
def test_what_is_no_base64_is_refused_and_names_the_field(text: str) -> None:
    with pytest.raises(InvalidImage, match=r"(?s)mask is .*: neither base64 nor a data URL") as refusal:
        from_base64(text, max_bytes=100, field="mask")
    assert refusal.value.field == "mask"


@pytest.mark.parametrize("text", ["", " \n", "data:image/png;base64,", "data:image/png;base64", "===="])
def test_an_empty_picture_is_refused(text: str) -> None:
    with pytest.raises(InvalidImage, match="image: there is no picture"):
        from_base64(text, max_bytes=100, field="image")


@pytest.mark.parametrize("text", ["data:image/png,abc", "data:,", "data:;base64x,aaaa"])
def test_a_data_url_that_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(InvalidImage, match="base64,<data>"):
        from_base64(text, max_bytes=100, field="image")


def test_the_length_is_checked_before_anything_is_decoded() -> None:
    with pytest.raises(TooLarge, match=r"image: .* 75 bytes; at most 74"):
        from_base64("*" * 100, max_bytes=74, field="image")


def test_a_refusal_does_not_repeat_the_picture() -> None:
    with pytest.raises(InvalidImage) as refusal:
        from_base64("A" * 5000 + "*", max_bytes=10_000, field="image")
    assert len(str(refusal.value)) < 200


# pictures out of logs and records


LONG = base64.b64encode(bytes(range(256))).decode()


def test_pictures_are_replaced_wherever_they_are() -> None:
    url = f"data:image/png;base64,{LONG}"
    payload = {
        "image": url,
        "prompt": "a cat",
        "seed": 1,
        "nested": [{"mask": LONG, "deep": (LONG, None, 1.5, True)}, "data:image/gif;base64,AA=="],
    }
    mark = f"[BASE64_IMAGE_DATA_{len(LONG)}_chars]"
    assert sanitized(payload) == {
        "image": f"[BASE64_IMAGE_DATA_{len(url)}_chars]",
        "prompt": "a cat",
        "seed": 1,
        "nested": [{"mask": mark, "deep": [mark, None, 1.5, True]}, "[BASE64_IMAGE_DATA_26_chars]"],
    }


def test_the_original_stays_as_it_was_and_the_order_of_keys_is_kept() -> None:
    payload = {"b": {"image": LONG}, "a": [LONG]}
    copy = sanitized(payload)
    assert payload == {"b": {"image": LONG}, "a": [LONG]}
    assert list(copy) == ["b", "a"]


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        base64.encodebytes(bytes(500)).decode(),
        base64.urlsafe_b64encode(bytes(range(256))).decode(),
        " " + LONG,
        "Data:Image/jpeg;base64,AAAA",
    ],
)
def test_base64_in_every_dress_is_a_picture(text: str) -> None:
    assert sanitized(text) == f"[BASE64_IMAGE_DATA_{len(text)}_chars]"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "A" * 100,
        "word " * 100,
        "cat, " * 100,
        "a very long prompt without any comma or full stop " * 10,
        "一" * 200,
        "https://example.org/" + "a" * 200,
        " " * 200,
    ],
)
def test_prompts_and_short_texts_stay(text: str) -> None:
    assert sanitized(text) == text


def test_any_depth_is_copied() -> None:
    value: object = LONG
    for _ in range(50_000):
        value = [value]
    copy = sanitized(value)
    for _ in range(50_000):
        copy = copy[0]
    assert copy == f"[BASE64_IMAGE_DATA_{len(LONG)}_chars]"
