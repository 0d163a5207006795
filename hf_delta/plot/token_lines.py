"""Text as a terminal would show it, in cells of one width: what each token looks like, and where its box goes."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


# What would be invisible, or change the layout.
_MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "·", "\u3000": "·"}
_UNKNOWN = "\ufffd"
# Categories of characters without a picture of their own: controls, formats, surrogates, private use, separators.
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")


@dataclass(frozen=True)
class Box:
    """Where the token at `index` stands: in a line, from a cell on, over a number of cells."""

    index: int
    line: int
    start: int
    width: int
    text: str


def visible(token: str) -> str:
    """A token's text with marks for spaces and line breaks, and the replacement character for what cannot be drawn."""
    if not token:
        return "∅"
    shown = (
        mark if (mark := _MARKS.get(char)) else _UNKNOWN if unicodedata.category(char) in _INVISIBLE else char
        for char in unicodedata.normalize("NFC", token)
    )
    text = "".join(shown)
    # A mark that combines with what stands before it needs something there.
    return "◌" + text if unicodedata.combining(text[0]) else text


def cells(text: str) -> int:
    """Cells that a text takes: two for a wide character of East Asia or an emoji, none for a combining one."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def shortened(text: str, width: int, keep_end: bool = False) -> str:
    """A text that takes no more than so many cells, with an ellipsis for its end, or for its beginning, if that is cut."""
    if cells(text) <= width:
        return text
    chars, room = [], width - 1
    for char in reversed(text) if keep_end else text:
        room -= cells(char)
        if room < 0:
            break
        chars.append(char)
    return "…" + "".join(reversed(chars)) if keep_end else "".join(chars) + "…"


def wrapped(tokens: Sequence[str], width: int, most_lines: int) -> list[Box]:
    """Boxes of as many tokens as there is room for; a line ends after a token that ends with a line break.

    Args:
        tokens (sequence of `str`): their texts.
        width (`int`): cells of a line.
        most_lines (`int`): how many lines there may be.
    """
    boxes: list[Box] = []
    line = start = 0
    for index, token in enumerate(tokens):
        text = shortened(visible(token), width)
        size = max(cells(text), 1)
        if start + size > width:
            line, start = line + 1, 0
        if line >= most_lines:
            break
        boxes.append(Box(index, line, start, size, text))
        start += size
        if token.endswith("\n"):
            line, start = line + 1, 0
    return boxes
