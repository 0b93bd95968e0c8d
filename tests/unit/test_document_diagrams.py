"""Diagrams in documents can be drawn: known kinds, closed brackets and blocks, known participants."""

from __future__ import annotations

import re

import pytest

from tests.documents import NAMES, fenced, text_of

DIAGRAMS = [
    pytest.param(diagram, id=f"{name}-{number}")
    for name in NAMES
    for number, diagram in enumerate(fenced(text_of(name), "mermaid"), 1)
]
KINDS = r"(flowchart (LR|TB)|sequenceDiagram|stateDiagram-v2)"
PAIRS = {")": "(", "]": "[", "}": "{"}
MESSAGE = re.compile(r"(\w+)-?->>(\w+): \S.*")
TRANSITION = re.compile(r"(\w+|\[\*\]) --> (\w+|\[\*\])(: \S.*)?")
OPENS, CLOSES, GOES_ON = ("alt ", "opt ", "loop ", "subgraph "), "end", "else "


def lines(diagram: str) -> list[str]:
    return [line.strip() for line in diagram.splitlines()[1:]]


def problems(diagram: str) -> list[str]:
    """Return what keeps a diagram from being drawn, as far as its form tells."""
    kind = diagram.splitlines()[0]
    found = [] if re.fullmatch(KINDS, kind) else [f"{kind} is no known kind"]
    depth = 0
    for line in lines(diagram):
        depth += line.startswith(OPENS) - (line == CLOSES)
        if depth < 0:
            found.append("there is an end too many")
        found += [f"{line}: {what}" for what in _of_line(kind, line, diagram)]
    return found + (["a block has no end"] if depth else [])


def _of_line(kind: str, line: str, diagram: str) -> list[str]:
    if kind == "sequenceDiagram" and not line.startswith(("participant ", *OPENS, GOES_ON)) and line != CLOSES:
        message = MESSAGE.fullmatch(line)
        if message is None:
            return ["neither a message nor a block"]
        return [f"{who} is no participant" for who in message.groups() if f"participant {who} as " not in diagram]
    if kind == "stateDiagram-v2":
        return [] if TRANSITION.fullmatch(line) else ["no transition"]
    return [] if kind == "sequenceDiagram" or _is_closed(line) else ["a bracket or quote is not closed"]


def _is_closed(line: str) -> bool:
    plain = re.sub(r'"[^"]*"', "", line)
    opened: list[str] = []
    for letter in plain:
        if letter in PAIRS.values():
            opened.append(letter)
        elif letter in PAIRS and (not opened or opened.pop() != PAIRS[letter]):
            return False
    return not opened and '"' not in plain


@pytest.mark.parametrize("diagram", DIAGRAMS)
def test_every_diagram_can_be_drawn(diagram: str) -> None:
    assert problems(diagram) == []


@pytest.mark.parametrize(
    ("diagram", "problem"),
    [
        ("pie\n", "no known kind"),
        ("flowchart LR\n  a[b", "not closed"),
        ("flowchart LR\n  subgraph s\n  a --> b", "no end"),
        ("sequenceDiagram\n  participant A as a\n  A->>B: hello", "B is no participant"),
        ("sequenceDiagram\n  participant A as a\n  A->>A:", "neither a message"),
        ("stateDiagram-v2\n  A -> B", "no transition"),
        ("flowchart LR\n  end", "an end too many"),
    ],
)
def test_a_diagram_that_cannot_be_drawn_is_found(diagram: str, problem: str) -> None:
    assert any(problem in found for found in problems(diagram))
