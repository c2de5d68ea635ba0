"""The prompt language: attention weights, schedules, alternation, AND, BREAK, networks and comments.

The language is that of A1111 v1.10.1; ``docs/prompts.md`` is its manual, and says what is done otherwise. Nothing here raises,
whatever the text: what means nothing is taken literally. Everything takes time linear in the length of the text.

:func:`parse` reads a prompt. What its parts say at each step is text again, which :func:`emphasis` reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import chain, groupby, pairwise
from typing import NamedTuple, TypeAlias

DEEPEST = 100
"""Schedules within schedules; a deeper one is taken literally."""

GREATEST = 1e6
"""A number beyond it, up or down, counts as it: larger ones overflow."""

STRONGER = 1.1
"""The weight of ``(x)``, and what ``[x]`` divides by."""

MOST_SAID = 5
"""Sentences about one prompt."""
LONGEST = 60
"""Characters of it that they show."""

_COMMENT = re.compile(r"#[^\n]*")
_NETWORK = re.compile(r"<(\w++):([^>]++)>")
_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\bBREAK\b\s*+")
_NUMBER = r"[+-]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++)"
_WEIGHT = re.compile(rf":\s*+({_NUMBER})\s*+\Z")
_LIKE_A_WEIGHT = re.compile(r":\s*+([^\s:()\[\]|<>]{1,60}+)\s*+\)")
_LIKE_A_NUMBER = re.compile(r"[+-]?(?:[0-9.][0-9.,]*(?:[eE][+-]?[0-9]+)?|inf(?:inity)?|nan)", re.IGNORECASE)
_WHEN = re.compile(rf"\s*+({_NUMBER}(?:[eE][+-]?[0-9]++)?)\s*+")
_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]++|\\")
_ATTENTION = re.compile(rf"\\[()\[\]\\]|\\|[(\[]|:\s*+({_NUMBER})\s*+\)|[)\]]|[^\\()\[\]:]++|:")


class Course(NamedTuple):
    """The steps of a pass, and how many a first pass had: in a second one shares run from 1 to 2, and steps count on."""

    steps: int
    done: int = 0


@dataclass(frozen=True)
class Scheduled:
    """``[before:after:when]``: one text up to a step, another one from there on.

    ``when`` is as written: with a point a share of the steps, without one a step.
    """

    before: Nodes
    after: Nodes
    when: str

    def last(self, course: Course) -> int:
        """The last step of ``before``, 1 to the last one; less than 1 when there is none."""
        begun, unit = (course.done > 0, course.steps) if "." in self.when else (course.done, 1)
        value = (float(self.when) - begun) * unit
        return int(min(max(value, -1.0), course.steps))

    def __str__(self) -> str:
        before = f"{_written(self.before)}:" if self.before else ""
        return f"[{before}{_written(self.after)}:{self.when}]"


@dataclass(frozen=True)
class Alternated:
    """``[a|b|c]``: another one at each step, around."""

    choices: tuple[Nodes, ...]

    def __str__(self) -> str:
        return f"[{'|'.join(map(_written, self.choices))}]"


_Node: TypeAlias = str | Scheduled | Alternated

Nodes: TypeAlias = tuple[_Node, ...]
"""A text that depends on the step. Strings are literal, attention syntax included, and never stand side by side."""


@dataclass(frozen=True)
class Part:
    """What stands between two ANDs, and how much it counts."""

    nodes: Nodes
    weight: float = 1.0

    def schedule(self, steps: int, done: int = 0) -> tuple[tuple[int, str], ...]:
        """The texts, each with the last step at which it holds; the last one's is ``steps``. Steps count from 1.

        ``done`` are the steps of the first pass, for those of a second.
        """
        course = Course(steps, done)
        ends = {steps, *_ends(self.nodes, course)}
        return tuple((step, "".join(_at(self.nodes, step, course))) for step in sorted(ends))

    def __str__(self) -> str:
        text = _written(self.nodes)
        return text if self.weight == 1 and not _WEIGHT.search(text) else f"{text}:{_number(self.weight)}"


@dataclass(frozen=True)
class Network:
    """``<kind:name:text_encoder:unet>``: an extra network, and how strongly it works on each half of the model."""

    kind: str
    name: str
    text_encoder: float = 1.0
    unet: float = 1.0

    def __str__(self) -> str:
        return f"<{self.kind}:{self.name}:{_number(self.text_encoder)}:{_number(self.unet)}>"


@dataclass(frozen=True)
class Prompt:
    """A prompt as a tree. As a string it is a prompt of the same meaning, and the same string again when that is parsed."""

    parts: tuple[Part, ...]
    networks: tuple[Network, ...] = ()

    def __str__(self) -> str:
        text = _each_network(lambda tag: f"<\\{tag[0][1:]}", " AND ".join(map(str, self.parts)))
        return "".join(map(str, self.networks)) + text


class Piece(NamedTuple):
    """Words of one weight."""

    text: str
    weight: float


def uncommented(text: str) -> str:
    """A prompt without its comments."""
    return _COMMENT.sub("", text)


def parse(text: str) -> Prompt:
    """The tree of a prompt."""
    networks: list[Network] = []

    def taken(tag: re.Match[str]) -> str:
        networks.append(_network(tag[1], tag[2]))
        return ""

    text = _each_network(taken, uncommented(text))
    return Prompt(tuple(map(_part, _AND.split(text))), tuple(networks))


def parse_negative(text: str) -> Part:
    """The tree of a negative prompt, where AND and networks are plain words."""
    return Part(_tree(uncommented(text)))


def emphasis(text: str) -> tuple[tuple[Piece, ...], ...]:
    """The text of one step: for each section between BREAKs its pieces. Neighbours differ in weight, and none is empty.

    Round and square brackets are matched apart from each other, so that they may overlap.
    """
    marks = [(mark[0], mark[1]) for mark in _ATTENTION.finditer(text)]
    brackets = _brackets(marks)
    scopes = {"(": [1.0], "[": [1.0]}
    sections: list[list[Piece]] = [[]]
    for place, (mark, _) in enumerate(marks):
        if bracket := brackets.get(place):
            kind, factor = bracket
            if factor is None:
                scopes[kind].pop()
            else:
                scopes[kind].append(scopes[kind][-1] * factor)
            continue
        first, *others = [mark[1:]] if mark[0] == "\\" else _broken(mark)
        weight = scopes["("][-1] * scopes["["][-1]
        sections[-1].append(Piece(first, weight))
        sections += ([Piece(other, weight)] for other in others)
    return tuple(tuple(_merged(section)) for section in sections)


def _brackets(marks: list[tuple[str, str | None]]) -> dict[int, tuple[str, float | None]]:
    """The marks that are brackets and no text, by their place: the kind, and the factor of an opener."""
    found: dict[int, tuple[str, float | None]] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for place, (mark, weight) in enumerate(marks):
        if mark in opened:
            found[place] = mark, STRONGER if mark == "(" else 1 / STRONGER
            opened[mark].append(place)
        elif mark == "]" or weight is not None or mark == ")":
            kind = "[" if mark == "]" else "("
            if opened[kind]:
                start = opened[kind].pop()
                found[place] = kind, None
                if weight is not None:
                    found[start] = kind, _value(weight)
    return found


def _broken(text: str) -> list[str]:
    """What stands between the BREAKs, without the white space around them."""
    *others, last = _BREAK.split(text)
    return [*(other.rstrip() for other in others), last]


def _merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    for weight, same in groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.weight):
        yield Piece("".join(piece.text for piece in same), weight)


def _part(text: str) -> Part:
    weight = 1.0
    if found := _WEIGHT.search(text):
        weight = _value(found[1])
        text = text[: found.start()]
    return Part(_tree(text.strip()), weight)


def _each_network(replaced: Callable[[re.Match[str]], str], text: str) -> str:
    # What follows the last ">" would be searched again from each "<" in it.
    end = text.rfind(">") + 1
    return _NETWORK.sub(replaced, text[:end]) + text[end:]


def misread(text: str) -> list[str]:
    """What looks like a number in a prompt and is none: each as a sentence for its author, the first few of them."""
    plain = uncommented(text)
    found = [
        f"prompt: {number!r} is no number for a weight, as 1.2 is one: it is read as words"
        for number in _LIKE_A_WEIGHT.findall(plain)
        if _LIKE_A_NUMBER.fullmatch(number) and not re.fullmatch(_NUMBER, number)
    ]
    for tag in _NETWORK.finditer(plain):
        wrong = [part for part in _strengths(tag[2]) if not re.fullmatch(_NUMBER, part.strip())]
        found += [f"prompt: {part[:LONGEST]!r} in {tag[0][:LONGEST]!r} is no number; 1 is used" for part in wrong]
    return found[:MOST_SAID]


def _strengths(content: str) -> list[str]:
    """What a network says of its strengths, as written."""
    arguments = content.split(":")
    named = [part.partition("=")[2] for part in arguments if part.startswith(("te=", "unet="))]
    return [part for part in arguments[1:3] if "=" not in part] + named


def _network(kind: str, content: str) -> Network:
    arguments = content.split(":")
    named = dict(a.split("=") for a in arguments if a.count("=") == 1)
    name, *strengths = [a for a in arguments if a.count("=") != 1] or [""]
    text_encoder = _strength(named.get("te", "".join(strengths[:1])), default=1.0)
    unet = _strength(named.get("unet", "".join(strengths[1:2])), default=text_encoder)
    return Network("lora" if kind == "lyco" else kind, name, text_encoder, unet)


def _strength(text: str, *, default: float) -> float:
    return _value(text) if re.fullmatch(_NUMBER, text.strip()) else default


@dataclass
class _Open:
    """A bracket that is not closed yet: where it and the separators in it stand, and how deep the schedules in it go."""

    bracket: str
    start: int
    separators: list[int] = field(default_factory=list)
    bars: bool = False
    depth: int = 0

    def takes(self, separator: str) -> bool:
        """Whether the bracket may still be a proper one with that."""
        if separator == "|":
            return self.bracket == "[" and (self.bars or not self.separators)
        return not self.bars and len(self.separators) < (1 if self.bracket == "(" else 2)

    def closed(self, closer: str, found: list[_Node]) -> _Node | None:
        """What a closer makes of it: a schedule, the closer itself where both are for emphasis, None for neither."""
        if self.bracket + closer not in ("()", "[]"):
            return None
        if closer == ")" or not self.separators:
            return closer
        if self.depth == DEEPEST:
            return None
        bounds = pairwise((self.start, *self.separators, len(found)))
        *parts, last = (_joined(found[before + 1 : after]) for before, after in bounds)
        if self.bars:
            return Alternated((*parts, last))
        when = _WHEN.fullmatch("".join(map(str, last)))
        return Scheduled(parts[0] if len(parts) == 2 else (), parts[-1], when[1]) if when else None


def _tree(text: str) -> Nodes:
    """The schedules in a text.

    A bracket that is no proper one makes those around it improper too: all of them are text. A bar outside of an
    alternation, or a backslash with nothing behind it, makes the whole text literal.
    """
    found: list[_Node] = []
    opened: list[_Open] = []
    for mark in _TOKEN.findall(text):
        proper = True
        node: _Node | None = mark
        if mark in "([":
            opened.append(_Open(mark, len(found)))
        elif mark in "|:":
            proper = bool(opened) and opened[-1].takes(mark)
            if proper:
                opened[-1].bars = mark == "|"
                opened[-1].separators.append(len(found))
        elif mark in ")]":
            node = opened[-1].closed(mark, found) if opened else None
            proper = node is not None
            if proper:
                closed = opened.pop()
                if node != mark:
                    del found[closed.start :]
                depth = closed.depth + (node != mark)
                if opened:
                    opened[-1].depth = max(opened[-1].depth, depth)
        if not proper:
            if mark == "|" or any(bracket.bars for bracket in opened):
                return _joined([text])
            opened.clear()
        elif mark == "\\":
            return _joined([text])
        found.append(mark if node is None else node)
    return _joined([text] if any(bracket.bars for bracket in opened) else found)


def _joined(nodes: Iterable[_Node]) -> Nodes:
    runs = ((literal, list(run)) for literal, run in groupby(nodes, key=lambda node: isinstance(node, str)))
    joined = chain.from_iterable(["".join(map(str, run))] if literal else run for literal, run in runs)
    return tuple(node for node in joined if node)


def _ends(nodes: Nodes, course: Course) -> Iterator[int]:
    """The steps after which the text may be another one."""
    for node in nodes:
        if isinstance(node, Scheduled):
            if (last := node.last(course)) >= 1:
                yield last
            yield from _ends(node.before, course)
            yield from _ends(node.after, course)
        elif isinstance(node, Alternated):
            yield from range(1, course.steps + 1)


def _at(nodes: Nodes, step: int, course: Course) -> Iterator[str]:
    """The text at a step, in pieces."""
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, Scheduled):
            yield from _at(node.before if step <= node.last(course) else node.after, step, course)
        else:
            yield from _at(node.choices[(step - 1) % len(node.choices)], step, course)


def _written(nodes: Nodes) -> str:
    return "".join(map(str, nodes))


def _value(number: str) -> float:
    return min(max(float(number), -GREATEST), GREATEST)


def _number(value: float) -> str:
    """The shortest text that is read as the same number; never with an exponent."""
    return format(Decimal(repr(value)), "f").removesuffix(".0")
