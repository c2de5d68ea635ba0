"""Pictures as bytes, base64 and data URLs, within limits; and the codecs, with the infotext where A1111 puts it.

| format | where the infotext is |
|---|---|
| PNG | text chunk ``parameters``: tEXt if it is Latin-1, otherwise iTXt |
| JPEG, WebP, AVIF | EXIF UserComment: ``UNICODE\\0`` and UTF-16, big endian |
| GIF | comment, UTF-8 |
"""

from __future__ import annotations

import base64
import io
import logging
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diffusion_api.errors import InvalidImage, TooLarge
from diffusion_api.infotext import from_novelai
from diffusion_api.schema.request import Format

logger = logging.getLogger(__name__)

MAX_SIDE: dict[Format, int] = {"png": 2**31 - 1, "jpeg": 65500, "webp": 16383, "avif": 65536, "gif": 65535}
"""The longest side that each format can hold, pixels."""

_FORMATS: dict[str, Format] = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "GIF": "gif", "AVIF": "avif"}
_KINDS = "PNG, JPEG, WebP, GIF or AVIF"

# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, RuntimeError, struct.error, zlib.error)

# Entries of a picture's info that are no text about it (A1111 drops the same ones).
_TECHNICAL = {
    *(
        "jfif",
        "jfif_version",
        "jfif_unit",
        "jfif_density",
        "dpi",
        "exif",
        "loop",
        "background",
        "timestamp",
        "duration",
    ),
    *("progressive", "progression", "icc_profile", "chromaticity", "photoshop"),
}

_JPEG_SEGMENT = 65533

_EXIF_ORIENTATION = 0x0112
_EXIF_IFD = 0x8769
_EXIF_USER_COMMENT = 0x9286
_EXIF_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

_COMMENT_ENCODINGS = {b"ASCII": "utf-8", b"JIS": "shift_jis", b"": "utf-8"}

_LONG = 100
_SHOWN = 40
_BASE64_LINE = 40
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")


def encode(
    pixels: NDArray[np.uint8], *, format: Format, quality: int, infotext: str | None, lossless: bool = False
) -> bytes:
    """The picture as a file.

    ``pixels`` is (height, width, 3), RGB; ``quality`` is 1 to 100 and means nothing to PNG and GIF. PNG is lossless,
    and the same bytes each time; WebP is if ``lossless``; GIF has 256 colours.

    An infotext that does not fit into a JPEG (some 32,700 characters) is left out, with a warning in the log. Raises
    TooLarge where the format cannot hold the size.
    """
    height, width, channels = pixels.shape
    if channels != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"pixels must be (height, width, 3) of uint8, not {pixels.shape} of {pixels.dtype}")
    if max(width, height) > MAX_SIDE[format]:
        raise TooLarge(f"{format} holds at most {MAX_SIDE[format]} pixels per side; the picture has {width}x{height}")
    text = _storable(infotext) if infotext else ""
    if format == "png":
        return _png(pixels, text)
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if format == "gif":
        image.save(file, "GIF", comment=text.encode())
    elif format == "jpeg":
        exif = _exif(text)
        if len(exif) > _JPEG_SEGMENT:
            logger.warning("an infotext of %d characters does not fit into a JPEG and is left out", len(text))
            exif = b""
        image.save(file, "JPEG", quality=quality, optimize=True, exif=exif)
    elif format == "webp" and lossless:
        image.save(file, "WEBP", lossless=True, exif=_exif(text))
    else:
        image.save(file, format.upper(), quality=quality, exif=_exif(text))
    return file.getvalue()


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """The picture in a file, upright as its EXIF says; the first frame of an animation.

    Accepts PNG, JPEG, WebP, GIF and AVIF, by content. The mode is the file's, except that 16 bits become 8. Raises
    TooLarge before any pixel is decoded, and InvalidImage for other kinds and damaged files.
    """
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise TooLarge(f"the picture has {width}x{height} pixels; at most {max_pixels} pixels in all are accepted")
    try:
        image.load()
    except _DAMAGE as error:
        raise InvalidImage(f"the {image.format} picture is damaged or cut short: {error}") from error
    upright = _UPRIGHT.get(_orientation(image))
    plain = image.transpose(upright) if upright is not None else image.copy()
    if plain.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(plain) >> 8).astype(np.uint8))
    return plain


def media_type(data: bytes) -> str:
    """The media type of a picture that can be decoded. Raises InvalidImage, TooLarge."""
    return f"image/{_FORMATS[str(_open(data).format)]}"


@dataclass(frozen=True)
class Metadata:
    """What a file says beside its pixels: the infotext, if it has one, all other texts by keyword, the format, and the size
    in pixels, upright.
    """

    infotext: str | None
    items: Mapping[str, str]
    format: Format
    width: int
    height: int


def read_infotext(data: bytes) -> str | None:
    """The generation parameters in a file, or None. Raises what :func:`read_metadata` raises."""
    return read_metadata(data).infotext


def read_metadata(data: bytes) -> Metadata:
    """What a file says beside its pixels, of which none is decoded.

    An EXIF comment goes before a PNG's ``parameters``; the comment of a GIF or JPEG counts when there is no EXIF; a
    NovelAI picture is told in A1111's words. Raises InvalidImage for what is no picture and TooLarge for a bomb;
    broken metadata in a picture is passed over.
    """
    image = _open(data)
    texts = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
    items = {key: text for key, text in texts.items() if key not in _TECHNICAL}
    found = items.pop("parameters", None)
    comment = image.info.get("comment")
    if exif := _exif_block(image):
        told = _comment_text(_exif_tag(exif, _EXIF_IFD, _EXIF_USER_COMMENT))
        found = told if told.strip() else found
    elif isinstance(comment, bytes):
        found = comment.decode("utf-8", "ignore")
    width, height = reversed(image.size) if _orientation(image) in _SIDEWAYS else image.size
    if items.get("Software") == "NovelAI":
        description, settings = items.get("Description", ""), items.get("Comment", "")
        found = from_novelai(description, settings, width=width, height=height) or found
    return Metadata(found or None, items, _FORMATS[str(image.format)], width, height)


def from_base64(text: str, *, max_bytes: int, field: str) -> bytes:
    """The bytes in base64 text or a ``data:`` URL; white space and missing padding are forgiven.

    Raises TooLarge before anything is decoded, and InvalidImage; both name ``field``.
    """
    payload = text.strip()
    if payload[:5].lower() == "data:":
        head, _, payload = payload.partition(",")
        if not head.lower().endswith(";base64"):
            raise InvalidImage(f"{field}: a data URL must be data:image/<kind>;base64,<data>", field=field)
    payload = "".join(payload.split()).rstrip("=")
    if not payload:
        raise InvalidImage(f"{field}: there is no picture in it", field=field)
    size = len(payload) * 3 // 4
    if size > max_bytes:
        raise TooLarge(f"{field}: the picture has {size} bytes; at most {max_bytes} are accepted")
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except ValueError as error:
        shown = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
        raise InvalidImage(f"{field} is {shown!r}: neither base64 nor a data URL ({error})", field=field) from error


def sanitized(value: Any) -> Any:
    """A copy of JSON-like data, for logs and records, with ``[BASE64_IMAGE_DATA_<n>_chars]`` in place of each picture.

    A picture is a text that starts with ``data:image/``, or has more than 100 characters and is base64 all through.
    """
    root: dict[str, Any] = {"": None}
    pending: list[tuple[Any, Any, Any]] = [(root, "", value)]
    while pending:
        target, key, item = pending.pop()
        if isinstance(item, dict):
            target[key] = copy = dict.fromkeys(item)
            pending.extend((copy, name, inner) for name, inner in item.items())
        elif isinstance(item, list | tuple):
            target[key] = rows = [None] * len(item)
            pending.extend((rows, index, inner) for index, inner in enumerate(item))
        elif isinstance(item, str) and _is_picture(item):
            target[key] = placeholder(item)
        else:
            target[key] = item
    return root[""]


def placeholder(picture: str) -> str:
    """What logs and records have in place of a picture in base64."""
    return f"[BASE64_IMAGE_DATA_{len(picture)}_chars]"


def _is_picture(text: str) -> bool:
    if text[:100].lstrip().lower().startswith("data:image/"):
        return True
    if len(text) <= _LONG:
        return False
    # Wrapped base64 has long lines; no prompt consists of words of 40 letters.
    *lines, last = text.split() or [""]
    return all(len(line) >= _BASE64_LINE for line in lines) and _BASE64.fullmatch("".join([*lines, last])) is not None


def _storable(text: str) -> str:
    """Without NUL, which ends texts in some formats, and with halves of surrogate pairs joined or replaced."""
    return text.replace("\0", "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _png(pixels: NDArray[np.uint8], text: str) -> bytes:
    """A PNG with the Up filter in every row and only run-length matches: many times as fast as trying all filters."""
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, width * 3)
    filtered = np.empty((height, 1 + width * 3), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if text:
        chunks.append(_text_chunk("parameters", text))
    chunks.append(_chunk(b"IDAT", deflate.compress(filtered.data) + deflate.flush()))
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks, _chunk(b"IEND", b"")])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _text_chunk(keyword: str, text: str) -> bytes:
    head = keyword.encode("latin-1") + b"\0"
    try:
        return _chunk(b"tEXt", head + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", head + b"\0\0\0\0" + text.encode())


def _exif(text: str) -> bytes:
    if not text:
        return b""
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif.tobytes()


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=list(_FORMATS))
    except Image.DecompressionBombError as error:
        raise TooLarge("the picture has more pixels than any limit allows") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"not a picture that can be read: it begins with {data[:19]!r}; send {_KINDS}") from error
    except _DAMAGE as error:
        raise InvalidImage(f"the picture is damaged: {error}") from error


def _exif_block(image: Image.Image) -> bytes:
    block = image.info.get("exif")
    return block.removeprefix(b"Exif\0\0") if isinstance(block, bytes) else b""


def _byte_order(exif: bytes) -> Literal["little", "big"]:
    return "little" if exif.startswith(b"II") else "big"


def _exif_tag(exif: bytes, *path: int) -> bytes:
    """The value of the last tag on the path from the first directory (TIFF 6.0, section 2); empty when it is not there.

    Reads by slices, so offsets that point nowhere give nothing.
    """
    order = _byte_order(exif)

    def number(start: int, size: int) -> int:
        return int.from_bytes(exif[start : start + size], order)

    pointer = 4
    for tag in path:
        directory = number(pointer, 4)
        entries = range(directory + 2, directory + 2 + 12 * number(directory, 2), 12)
        entry = next((entry for entry in entries if number(entry, 2) == tag), None)
        if entry is None:
            return b""
        pointer = entry + 8
    size = _EXIF_SIZES.get(number(pointer - 6, 2), 1) * number(pointer - 4, 4)
    start = pointer if size <= 4 else number(pointer, 4)
    return exif[start : start + size]


def _orientation(image: Image.Image) -> int:
    exif = _exif_block(image)
    return int.from_bytes(_exif_tag(exif, _EXIF_ORIENTATION), _byte_order(exif))


def _comment_text(comment: bytes) -> str:
    """The text of an EXIF UserComment: eight bytes that name the encoding, and the text."""
    code = comment[:8].rstrip(b"\0 ").upper()
    if code == b"UNICODE":
        text = _utf16_text(comment[8:])
    elif code in _COMMENT_ENCODINGS:
        text = comment[8:].decode(_COMMENT_ENCODINGS[code], "ignore")
    else:
        text = comment.decode("utf-8", "ignore")
    return text.strip("\0")


def _utf16_text(body: bytes) -> str:
    """UTF-16 in whichever byte order gives more ASCII: A1111 writes big endian, others little endian."""
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return body.decode("utf-16", "ignore")
    units = np.frombuffer(body, ">u2", len(body) // 2)
    swapped = units.byteswap()
    big, little = (np.count_nonzero((order >= 0x20) & (order < 0x7F)) for order in (units, swapped))
    return body.decode("utf-16-le" if little > big else "utf-16-be", "ignore")
