"""What a file of torch.save holds, read from the opcodes of its pickle: nothing in it is run, and no object is made."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

MAX_PICKLE = 8 * 2**20
"""Bytes of the part that describes the tensors; their numbers lie elsewhere."""

DATA = re.compile(
    r"(torch(\._utils)? (_rebuild_\w+|\w+Storage|Size|\w*float\w*|\w*int\w*|bool|device)"
    r"|torch\.nn\.modules\.container ParameterDict|torch\.nn\.parameter Parameter"
    r"|(__builtin__|builtins) set|collections OrderedDict|_codecs encode|numpy\S* (scalar|dtype|_reconstruct|ndarray))"
)
"""What a pickle may name if it holds data alone."""

REBUILD = "torch._utils _rebuild_tensor_v2"
UNKNOWN = ("INST", "OBJ", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "INT")
TUPLES = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE")


def shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a file of torch.save (PyTorch 1.6 and later, a zip archive). Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [entry for entry in archive.infolist() if entry.filename.split("/")[1:] == ["data.pkl"]]
            if len(found) != 1:
                raise ValueError("it is no file of torch.save")
            if found[0].file_size > MAX_PICKLE:
                raise ValueError("its description of tensors is too large")
            content = archive.read(found[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError("it is no file of torch.save, or one of before PyTorch 1.6") from error
    return _shapes(content)


def _shapes(content: bytes) -> dict[str, list[int]]:
    """A tensor is its name, the function that rebuilds it, where its numbers lie, and then offset and shape. What was met
    before is called by a number.
    """
    found: dict[str, list[int]] = {}
    met: dict[int, str] = {}
    last = text = named = ""
    numbers: list[int] | None = None
    for opcode, given, _ in pickletools.genops(content):
        name, argument = opcode.name, str(given)
        if name in UNKNOWN:
            raise ValueError(f"it has the instruction {name}, which no file of torch.save needs")
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            met[int(argument)] = last
            continue
        last = met.get(int(argument), "") if name in ("BINGET", "LONG_BINGET", "GET") else argument
        if name == "GLOBAL" and not DATA.fullmatch(last):
            raise ValueError(f"it names {last[:80].replace(' ', '.')}, which is no data")
        if last == REBUILD:
            named = text
        elif name in TEXTS or (name.endswith("GET") and last):
            text = last
        elif name == "BINPERSID":
            numbers = []
        elif numbers is not None and name in NUMBERS:
            numbers.append(int(argument))
        elif numbers is not None and name in TUPLES:
            found[named], numbers = numbers[1:], None
    return found
