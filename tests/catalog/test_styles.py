"""Styles as A1111 keeps them in ``styles.csv``."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from diffusion_api.catalog.styles import Style, read


@pytest.mark.parametrize(
    ("style", "prompt", "expected"),
    [
        (Style("s", "oil painting"), "a cat", "a cat, oil painting"),
        (Style("s", "oil painting"), "", "oil painting"),
        (Style("s", " oil "), " a cat ", "a cat, oil"),
        (Style("s", ""), "a cat", "a cat"),
        (Style("s", "a painting of {prompt}, oil"), "a cat", "a painting of a cat, oil"),
        (Style("s", "{prompt} and {prompt}"), "a", "a and a"),
        (Style("s", "a painting of {prompt}"), "", "a painting of "),
    ],
)
def test_a_style_is_put_around_a_prompt(style: Style, prompt: str, expected: str) -> None:
    assert style.around(prompt, "")[0] == expected


def test_a_style_has_a_negative_prompt_of_its_own() -> None:
    assert Style("s", "oil", "{prompt}, photo").around("a cat", "fog") == ("a cat, oil", "fog, photo")


def test_the_file_of_a1111_is_read(tmp_path: Path) -> None:
    file = tmp_path / "styles.csv"
    file.write_text(
        '\ufeffname,prompt,negative_prompt\r\noil,"oil, {prompt}",photo\r\n# --- cinema ---,,\r\n\r\n'
        'noir,"black\nwhite"\r\nquoted,"a ""b""",\r\n,nameless,\r\n'
    )
    assert list(read([file]).values()) == [
        Style("oil", "oil, {prompt}", "photo"),
        Style("noir", "black\nwhite", ""),
        Style("quoted", 'a "b"', ""),
    ]


def test_the_oldest_files_have_one_text(tmp_path: Path) -> None:
    file = tmp_path / "styles.csv"
    file.write_text("name,text\noil,oil painting\n")
    assert read([file])["oil"] == Style("oil", "oil painting")


def test_of_two_files_the_first_goes_before(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("name,prompt,negative_prompt\na,1,\n")
    two.write_text("name,prompt,negative_prompt\na,2,\nb,3,\n")
    assert {name: style.prompt for name, style in read([one, two]).items()} == {"a": "1", "b": "3"}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "styles.csv"
    for text in ("first", "second one"):
        file.write_text(f"name,prompt,negative_prompt\na,{text},\n")
        assert read([file])["a"].prompt == text


@pytest.mark.parametrize("content", [b"name,prompt\n\xff\xfe,x\n", b'name,prompt\na,"' + b"x" * 200_000, b""])
def test_a_file_that_cannot_be_read_hides_no_other(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = tmp_path / "broken.csv", tmp_path / "whole.csv"
    broken.write_bytes(content)
    whole.write_text("name,prompt\na,1\n")
    with caplog.at_level(logging.WARNING):
        assert read([broken, tmp_path / "gone.csv", whole]) == {"a": Style("a", "1")}
    assert "gone.csv cannot be read" in caplog.text
    assert ("broken.csv cannot be read" in caplog.text) == bool(content)
