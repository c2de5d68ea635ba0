"""What happens to pictures and masks before a pass and after it, against Pillow and SciPy where they do the same."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter1d

from diffusion_api import canvas
from diffusion_api.canvas import Box


def picture(width: int, height: int) -> Image.Image:
    """A gradient with a black frame, so that a shift of one pixel shows."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], 2).astype(np.uint8)
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).rectangle((0, 0, width - 1, height - 1), outline="black")
    return image


def disc(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    assert canvas.flattened(image).tobytes() == bytes((255, 0, 0, 255, 255, 255))


def test_a_palette_with_a_transparent_colour_becomes_white_there() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    assert canvas.flattened(image).tobytes() == bytes((10, 20, 30, 255, 255, 255))


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (40, 96), (37, 53)])
def test_just_resize_stretches_as_pillow_does(size: tuple[int, int]) -> None:
    image = picture(50, 70)
    assert (
        canvas.resized(image, *size, "just resize").tobytes() == image.resize(size, Image.Resampling.LANCZOS).tobytes()
    )


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (40, 96)])
def test_crop_and_resize_keeps_proportions_and_loses_the_edges(size: tuple[int, int]) -> None:
    image = Image.new("RGB", (80, 80), "red")
    ImageDraw.Draw(image).ellipse((20, 20, 60, 60), fill="blue")
    blue = np.asarray(canvas.resized(image, *size, "crop and resize"))[..., 2] > 128
    assert blue.shape == size[::-1]
    rows, columns = np.nonzero(blue)
    scale = max(size) / 80
    assert np.ptp(columns) + 1 == pytest.approx(min(41 * scale, size[0]), abs=2)
    assert np.ptp(rows) + 1 == pytest.approx(min(41 * scale, size[1]), abs=2)


@pytest.mark.parametrize("size", [(96, 40), (40, 96)])
def test_resize_and_fill_keeps_all_of_it_and_repeats_the_edges(size: tuple[int, int]) -> None:
    image = Image.new("RGB", (80, 80), "red")
    ImageDraw.Draw(image).rectangle((0, 0, 79, 39), fill="blue")
    pixels = np.asarray(canvas.resized(image, *size, "resize and fill"))
    assert pixels.shape == (size[1], size[0], 3)
    if size[0] > size[1]:
        assert (pixels == pixels[:, :1]).all()
    else:
        assert (pixels[:28] == (0, 0, 255)).all()
        assert (pixels[-28:] == (255, 0, 0)).all()


def test_a_mask_is_how_bright_a_picture_is() -> None:
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((1, 0), (255, 255, 255))
    assert canvas.mask_of(image, invert=False, blur=0).tobytes() == bytes((0, 255))
    assert canvas.mask_of(image, invert=True, blur=0).tobytes() == bytes((255, 0))


def test_a_mask_with_transparent_parts_is_where_it_is_opaque() -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 129))
    image.putpixel((2, 0), (255, 255, 255, 128))
    assert canvas.mask_of(image, invert=False, blur=0).tobytes() == bytes((0, 255, 0))


def test_an_opaque_alpha_channel_says_nothing() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (255, 255, 255, 255))
    assert canvas.mask_of(image, invert=False, blur=0).tobytes() == bytes((0, 255))


@pytest.mark.parametrize("sigma", [0.5, 4, 9.3])
def test_the_blur_is_a_gaussian_cut_off_after_two_and_a_half_sigma(sigma: float) -> None:
    mask = disc(60, 44, (0, 10, 30, 40))
    reach = int(2.5 * sigma + 0.5)
    expected = np.asarray(mask, np.float64)
    for axis in (0, 1):
        expected = gaussian_filter1d(expected, sigma, axis, mode="mirror", radius=reach)
    found = np.asarray(canvas.blurred(mask, sigma))
    assert np.abs(found - expected).max() <= 0.51
    assert canvas.blurred(mask, 0) is mask


def test_the_box_around_a_mask_gets_the_proportions_of_the_size() -> None:
    mask = disc(200, 100, (80, 40, 99, 59))
    assert canvas.painted(mask, padding=0, width=64, height=64) == Box(80, 40, 100, 60)
    assert canvas.painted(mask, padding=10, width=64, height=64) == Box(70, 30, 110, 70)
    assert canvas.painted(mask, padding=10, width=128, height=64) == Box(50, 30, 130, 70)
    assert canvas.painted(mask, padding=10, width=64, height=128) == Box(70, 10, 110, 90)


def test_the_box_stays_inside_the_picture() -> None:
    assert canvas.painted(disc(200, 100, (0, 0, 19, 19)), padding=32, width=64, height=64) == Box(0, 0, 52, 52)
    assert canvas.painted(disc(200, 100, (190, 80, 199, 99)), padding=0, width=64, height=64) == Box(180, 80, 200, 100)
    assert canvas.painted(disc(200, 100, (0, 40, 199, 59)), padding=0, width=64, height=64) == Box(0, 0, 200, 100)


def test_a_blank_mask_has_no_box() -> None:
    assert canvas.painted(Image.new("L", (64, 64)), padding=32, width=64, height=64) is None


def test_what_is_filled_looks_like_its_surroundings() -> None:
    image = Image.new("RGB", (64, 64), "orange")
    mask = disc(64, 64, (20, 20, 44, 44))
    image.paste((0, 0, 0), mask=mask)
    pixels = np.asarray(canvas.filled(image, mask)).astype(int)
    assert np.abs(pixels - (255, 165, 0)).max() < 8


def test_outside_the_mask_the_original_stays_pixel_for_pixel() -> None:
    original, new = picture(64, 48), Image.new("RGB", (64, 48), "purple")
    mask = canvas.blurred(disc(64, 48, (20, 10, 44, 34)), 3)
    black, white = np.asarray(mask) == 0, np.asarray(mask) == 255
    assert black.any()
    assert white.any()
    result = np.asarray(canvas.composed(new, original, mask))
    assert (result[black] == np.asarray(original)[black]).all()
    assert (result[white] == np.asarray(new)[white]).all()


def test_a_doubled_mask_covers_the_outer_half_of_the_blur() -> None:
    mask = Image.fromarray(np.array([[0, 1, 60, 127, 128, 255]], np.uint8))
    assert canvas.widened(mask).tobytes() == bytes((0, 2, 120, 254, 255, 255))


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 3, 2), (8, 4, 2), (9, 3, 3), (13, 4, 4)]
)
def test_a_grid_holds_pictures_in_rows_of_up_to_four(count: int, columns: int, rows: int) -> None:
    pictures = [Image.new("RGB", (6, 4), (20 * number + 1, 0, 0)) for number in range(count)]
    sheet = np.asarray(canvas.grid(pictures))
    assert sheet.shape == (rows * 4, columns * 6, 3)
    cells = [
        sheet[4 * row : 4 * row + 4, 6 * column : 6 * column + 6] for row in range(rows) for column in range(columns)
    ]
    found = [(int(cell[..., 0].min()), int(cell[..., 0].max())) for cell in cells]
    reds = [20 * number + 1 for number in range(count)]
    assert found == [(red, red) for red in reds] + [(0, 0)] * (rows * columns - count)
