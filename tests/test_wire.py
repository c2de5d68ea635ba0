"""JSON of callers, measured before it is parsed."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_api import wire
from diffusion_api.errors import DiffusionApiError, InvalidRequest, TooLarge

MIB = 2**20

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_json_is_read_as_python_reads_it(value: object, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    try:
        body = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only have escaped
        body = json.dumps(value, indent=indent).encode()
    assert wire.loads(body) == value


@given(st.text(alphabet='"\\[]{},:a1 ') | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_whatever_it_is_it_is_read_as_python_reads_it_or_refused(text: str) -> None:
    body = text.encode()
    try:
        expected: Any = json.loads(body)
    except ValueError:
        with pytest.raises(InvalidRequest, match="the body is no JSON"):
            wire.loads(body)
    else:
        found = wire.loads(body)
        assert found == expected or math.isnan(found)


def test_a_byte_order_mark_is_forgiven() -> None:
    assert wire.loads(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * depth + "1" + closing * depth).encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[[],{"b":"]]]]"},', "]")])
def test_depth_has_a_limit(opening: str, closing: str) -> None:
    allowed = wire.MAX_DEPTH if "[]" not in opening else wire.MAX_DEPTH - 1
    wire.loads(nested(allowed, opening, closing))
    with pytest.raises(InvalidRequest, match="nested too deeply: at most 32"):
        wire.loads(nested(wire.MAX_DEPTH + 1, opening, closing))


def test_brackets_in_texts_are_no_depth() -> None:
    text = "[{" * 1000 + '"\\' + "}" * 1000
    assert wire.loads(json.dumps({"a": text, text: 1}).encode()) == {"a": text, text: 1}


@pytest.mark.parametrize(
    "few",
    [
        lambda n: json.dumps([1] * n),
        lambda n: json.dumps([""] * n),
        lambda n: json.dumps([[]] * (n // 2)),
        lambda n: json.dumps({f"k{i}": "v" for i in range(n)}),
    ],
    ids=["numbers", "texts", "lists", "names"],
)
def test_the_number_of_values_has_a_limit(few: Any) -> None:
    wire.loads(few(wire.MAX_VALUES).encode())
    with pytest.raises(TooLarge, match="at most 10000 values"):
        wire.loads(few(wire.MAX_VALUES * 2 + 10).encode())


BOMBS = {
    "10^5 open lists": b"[" * 10**5,
    "10^5 names": json.dumps({f"k{i}": 1 for i in range(10**5)}).encode(),
    "empty lists": b"[" + b"[]," * (20 * MIB) + b"[]]",
    "empty texts": b"[" + b'"",' * (20 * MIB) + b'""]',
    "closed lists": b"]" * (60 * MIB),
    "quotes": b'"' * (60 * MIB),
}


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(bomb: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DiffusionApiError):
        wire.loads(bomb)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000 + 2 * len(bomb) // 1024  # two copies of the text; parsed, it would be twenty


@pytest.mark.parametrize(
    "piece",
    [b"A", rb"\"", rb"\\", rb"\u0041", "\u2222".encode(), b" "],
    ids=["text", "quotes", "backslashes", "code", "wide", "space"],
)
def test_a_long_text_takes_time_in_proportion(piece: bytes) -> None:
    def seconds(size: int) -> float:
        body = b'{"a": "' + piece * (size // len(piece)) + b'"}'
        began = time.process_time()
        wire.loads(body)
        return time.process_time() - began

    assert min(seconds(16 * MIB) for _ in range(3)) < 100 * min(seconds(MIB) for _ in range(3))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "at character 0"),
        (b'{"a": 1,}', "at character 8"),
        (b"\xff\xfe{\x00}\x00", "byte 0 is not UTF-8"),
        ('{"∢": "∢"}'.encode("utf-16-le"), "the body is no JSON"),
        (b"9" * 5000, "too many digits"),
    ],
)
def test_what_is_no_json_is_refused_with_the_place(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        wire.loads(body)
