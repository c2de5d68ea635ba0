"""The prompt language as a tree: what A1111 v1.10.1 reads, in linear time, without ever raising."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import ROOT

from diffusion_api import prompt
from diffusion_api.prompt import Network, Part, Piece, Prompt, emphasis, parse, parse_negative

Sections = list[list[tuple[str, float]]]


def weighed(text: str) -> Sections:
    return [[(piece.text, round(piece.weight, 4)) for piece in section] for section in emphasis(text)]


def schedule(text: str, steps: int = 10) -> list[tuple[int, str]]:
    (part,) = parse(text).parts
    return list(part.schedule(steps))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("(a)", [("a", 1.1)]),
        ("[a]", [("a", 0.9091)]),
        ("(a:1.5)", [("a", 1.5)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:+2.)", [("a", 2)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2)]),
        ("([a])", [("a", 1)]),
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        (r"\(a\)", [("(a)", 1)]),
        (r"\[a\] \\ \b", [(r"[a] \ b", 1)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        ("(a", [("a", 1.1)]),
        ("((a b", [("a b", 1.21)]),
        ("a) b]", [("a) b]", 1)]),
        ("a:1.5)", [("a:1.5)", 1)]),
        ("[a:1.5]", [("a:1.5", 0.9091)]),
        ("(a:1.2e3)", [("a:1.2e3", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.9091)]),
        ("(a:1.0)b", [("ab", 1)]),
        ("(a:0)", [("a", 0)]),
    ],
)
def test_weights(text: str, pieces: list[tuple[str, float]]) -> None:
    assert weighed(text) == [pieces]


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("a\n BREAK,b", [[("a", 1)], [(",b", 1)]]),
        ("BREAK a BREAK BREAK", [[], [("a", 1)], [], []]),
        ("BREAKFAST aBREAK BREAK_", [[("BREAKFAST aBREAK BREAK_", 1)]]),
        ("(a BREAK b:1.3)", [[("a", 1.3)], [("b", 1.3)]]),
        ("(a:-1) BREAK (b:-1)", [[("a", -1)], [("b", -1)]]),
        (r"BREA\K", [[("BREAK", 1)]]),
    ],
)
def test_breaks(text: str, sections: Sections) -> None:
    assert weighed(text) == sections


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [(10, "a cat")]),
        ("a [cat:dog:5] b", [(5, "a cat b"), (10, "a dog b")]),
        ("a [cat:dog:0.3]", [(3, "a cat"), (10, "a dog")]),
        ("[to:3]", [(3, ""), (10, "to")]),
        ("[:to:3]", [(3, ""), (10, "to")]),
        ("[from::3]", [(3, "from"), (10, "")]),
        ("[a:b: 3 ]", [(3, "a"), (10, "b")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:5.5]", [(10, "a")]),
        ("[a:b:25]", [(10, "a")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:0.05]", [(10, "b")]),
        ("[a:b:-3]", [(10, "b")]),
        ("[a:b:0.39]", [(3, "a"), (10, "b")]),
        ("[a:b:1e1]", [(10, "a")]),
        ("[a:b:1e999]", [(10, "a")]),
        ("[a:[b:c:6]:3]", [(3, "a"), (6, "b"), (10, "c")]),
        ("([a:b:5]:1.3)", [(5, "(a:1.3)"), (10, "(b:1.3)")]),
        ("[(a:1.2):(b):5]", [(5, "(a:1.2)"), (10, "(b)")]),
        ("(a:[1.2:1.5:5])", [(5, "(a:1.2)"), (10, "(a:1.5)")]),
        (r"[a\:b:c:5]", [(5, r"a\:b"), (10, "c")]),
    ],
)
def test_schedules(text: str, expected: list[tuple[int, str]]) -> None:
    assert schedule(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a:b:1.5]", [(4, "a"), (8, "b")]),
        ("[a:b:24]", [(4, "a"), (8, "b")]),
        ("[a:b:0.5]", [(8, "b")]),
        ("[a:b:1.0]", [(8, "b")]),
        ("[a:b:2.0]", [(8, "a")]),
        ("[a:b:20]", [(8, "b")]),
        ("[a:b:28]", [(8, "a")]),
        ("[[a:b:1.75]:c:0.5]", [(6, "c"), (8, "c")]),
    ],
)
def test_in_a_second_pass_shares_run_from_1_to_2_and_steps_count_on(text: str, expected: list[tuple[int, str]]) -> None:
    (part,) = parse(text).parts
    assert list(part.schedule(8, done=20)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a|b]", ["a", "b", "a", "b"]),
        ("[a|b|]", ["a", "b", "", "a"]),
        ("[fe|]male", ["female", "male", "female", "male"]),
        ("[a|[b|c]]", ["a", "c", "a", "c"]),
        ("[[a|b]:c:2]", ["a", "b", "c", "c"]),
        ("[a|b] [c|d|e]", ["a c", "b d", "a e", "b c"]),
    ],
)
def test_alternation(text: str, expected: list[str]) -> None:
    assert schedule(text, steps=4) == list(enumerate(expected, 1))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[a]",
            "[a:b]",
            "[a:b:c]",
            "[a:b:c:5]",
            "[a:b:5",
            "a:b:5]",
            "[a:b:(5)]",
            "[a|b:5]",
            "[a:b|c]",
            "[a|b",
            "a | b",
        ),
        *(
            "(a|b) [c:d:5]",
            "a | b [c:d:5]",
            "[c:d:5] \\",
            "[a ) b:c:5]",
            "([a ) b:c:5]",
            "[[a:b] c:d:5]",
            "[a:b:5e]",
            ":",
        ),
    ],
)
def test_what_is_no_schedule_is_text(text: str) -> None:
    assert parse_negative(text).schedule(10) == ((10, text),)


def test_a_schedule_beside_a_broken_bracket_holds() -> None:
    assert schedule("(a [b:c] [d:e:5]") == [(5, "(a [b:c] d"), (10, "(a [b:c] e")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a AND b", [("a", 1), ("b", 1)]),
        ("a :1.2 AND b:-.5", [("a", 1.2), ("b", -0.5)]),
        ("a:1.2", [("a", 1.2)]),
        ("a clock at 12:30", [("a clock at 12", 30)]),
        ("a SAND b ANDROID", [("a SAND b ANDROID", 1)]),
        ("a and b", [("a and b", 1)]),
        ("(a AND b)", [("(a", 1), ("b)", 1)]),
        ("a AND", [("a", 1), ("", 1)]),
        ("(a:1.2)", [("(a:1.2)", 1)]),
        ("a:1..2", [("a:1..2", 1)]),
    ],
)
def test_and(text: str, parts: list[tuple[str, float]]) -> None:
    assert [("".join(map(str, part.nodes)), part.weight) for part in parse(text).parts] == parts


def test_a_negative_prompt_knows_no_and_no_share_and_no_network() -> None:
    assert parse_negative("a AND [b|c] <lora:d:1>:1.2").schedule(2) == (
        (1, "a AND b <lora:d:1>:1.2"),
        (2, "a AND c <lora:d:1>:1.2"),
    )


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("<lora:x>", Network("lora", "x", 1, 1)),
        ("<lora:x:0.8>", Network("lora", "x", 0.8, 0.8)),
        ("<lora:x:0.8:0.5>", Network("lora", "x", 0.8, 0.5)),
        ("<lora:x:te=0.8:unet=-.5>", Network("lora", "x", 0.8, -0.5)),
        ("<lora:x:0.7:unet=0.5:dyn=4>", Network("lora", "x", 0.7, 0.5)),
        ("<lyco:x:2>", Network("lora", "x", 2, 2)),
        ("<hypernet:x:1>", Network("hypernet", "x", 1, 1)),
        ("<lora:x:much>", Network("lora", "x", 1, 1)),
        ("<lora:te=1>", Network("lora", "", 1, 1)),
    ],
)
def test_networks_are_taken_out(text: str, network: Network) -> None:
    found = parse(f"a {text}cat AND {text}b")
    assert found == Prompt((Part(("a cat",)), Part(("b",))), (network, network))


def test_the_last_mark_of_a_network_need_not_be_there() -> None:
    assert parse("a <lora:x") == Prompt((Part(("a <lora:x",)),))


def test_comments_go_up_to_the_end_of_their_line() -> None:
    assert schedule("a # [b:c:5]\ncat#dog") == [(10, "a \ncat")]


@pytest.mark.parametrize(
    "row", re.findall(r"^\| (`.*`) \| (`.*`) \|", (ROOT / "docs/prompts.md").read_text(), re.MULTILINE)
)
def test_the_examples_of_the_manual_are_so(row: tuple[str, str]) -> None:
    text, said = (cell.strip("`").replace(r"\|", "|") for cell in row)
    parts = []
    for part in parse(text).parts:
        texts = (
            (str(until), " BREAK ".join(_shown(section) for section in emphasis(words)))
            for until, words in part.schedule(10)
        )
        steps = " ".join(f"{until}: {words};" for until, words in texts).removesuffix(";").removeprefix("10: ")
        parts.append(steps if part.weight == 1 else f"{steps} * {part.weight:g}")
    assert " AND ".join(parts) == said


def _shown(section: tuple[Piece, ...]) -> str:
    return "".join(f"{piece.text}" if piece.weight == 1 else f"{piece.text}{{{piece.weight:.4g}}}" for piece in section)


MARKS = "( ) [ ] : | \\ # < > \n a b , . 0.5 5 1e3 :1.2) :0.5] AND BREAK <lora:x:1> <a:b> [a:b:5] [a|b] (a) - é"
SYNTAX = st.lists(st.sampled_from([*MARKS.split(" "), " ", "  ", " AND ", " BREAK "])).map("".join)


@given(st.one_of(st.text(), SYNTAX))
def test_any_text_is_read_and_printing_it_is_stable(text: str) -> None:
    found = parse(text)
    again = parse(str(found))
    assert str(again) == str(found)
    assert again.networks == found.networks
    assert [part.weight for part in again.parts] == [part.weight for part in found.parts]
    for before, after in zip(found.parts, again.parts, strict=True):
        for steps in (1, 7):
            old, new = before.schedule(steps), after.schedule(steps)
            assert [until for until, _ in old] == [until for until, _ in new]
            assert old[-1][0] == steps
            assert [emphasis(words) for _, words in old] == [emphasis(words) for _, words in new]


@given(st.one_of(st.text(), SYNTAX))
def test_a_negative_prompt_of_any_text_is_read(text: str) -> None:
    for _, words in parse_negative(text).schedule(5):
        for section in emphasis(words):
            assert all(piece.text for piece in section)


@given(st.text(alphabet=st.characters(exclude_characters="()[]\\:#<>|", exclude_categories=["Cs"])))
def test_a_text_without_syntax_stays_as_it_is(text: str) -> None:
    if not re.search(r"\b(AND|BREAK)\b", text):
        (part,) = parse(text).parts
        assert part == Part((text.strip(),) if text.strip() else ())
        assert emphasis(text) == (((Piece(text, 1.0),) if text else ()),)


def everything(text: str) -> None:
    str(parse(text))
    parse_negative(text)
    emphasis(text)


def lines_run(work: Callable[[str], None], text: str) -> int:
    """Lines of the module that are executed: work that is counted, as seconds would depend on who else is at work."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        if frame.f_code.co_filename != prompt.__file__:  # type: ignore[attr-defined]
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        work(text)
    finally:
        sys.settrace(before)
    return count


@settings(max_examples=10, deadline=None)
@given(SYNTAX.filter(bool), SYNTAX, SYNTAX)
def test_four_times_the_text_is_four_times_the_work(repeated: str, start: str, end: str) -> None:
    once, four = (lines_run(everything, start + repeated * times + end) for times in (10, 40))
    assert four <= 4 * once + 200


@pytest.mark.parametrize(
    "text", ["((((", "[[[[", "(a[", "[a:", "[a|", "(a:1.1)", "[a:b:5]", "<a:", ": ", "\\", "(((a:1.3)", "AND ", " "]
)
def test_patterns_that_look_back_are_linear(text: str) -> None:
    """What regular expressions do is not seen in lines: 16 times the text may take 64 times as long, squared is 256."""

    def seconds(times: int) -> float:
        tries = []
        gc.disable()  # its rounds grow with all that the other tests left behind
        try:
            for _ in range(3):
                began = time.process_time()
                everything(text * times)
                tries.append(time.process_time() - began)
        finally:
            gc.enable()
        return min(tries)

    seconds(500)
    assert seconds(8000) <= 64 * seconds(500)


def test_thousands_of_brackets_are_read() -> None:
    assert [len(section) for section in emphasis("(" * 2000 + "a" + ")" * 2000)] == [1]
    assert len(emphasis("(a:1.3) " * 500)[0]) == 1000
    everything("[a:" * 2000 + ":5]" * 2000)
    everything("[a|" * 2000 + "]" * 2000)


def test_a_hundred_schedules_within_schedules_are_read_and_more_are_text() -> None:
    def nested(depth: int) -> str:
        return "[a:" * depth + "b" + ":5]" * depth

    assert schedule(nested(100)) == [(5, "a"), (10, "b")]
    assert schedule(nested(101)) == [(5, "[a:a:5]"), (10, "[a:b:5]")]
