"""Text from a pool made fit to be shown: cut, and with what cannot be seen written out."""

from __future__ import annotations

import difflib
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence

_UNSEEN = re.compile(
    "[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Control, zero-width and direction characters as <U+200B>, so that they are seen and have no effect.

    The zero-width joiner inside of emoji and the tab and newline stay as they are.
    """
    found = []
    for place, character in enumerate(text):
        if character == "\u200d" and 0 < place < len(text) - 1 and _is_symbol(text[place - 1], text[place + 1]):
            found.append(character)
        elif _UNSEEN.match(character):
            found.append(f"<U+{ord(character):04X}>")
        else:
            found.append(character)
    return "".join(found)


def _is_symbol(before: str, after: str) -> bool:
    return all(unicodedata.category(c) in ("So", "Sk", "Mn") for c in (before, after))


def cut(text: str, most: int) -> str:
    """At most `most` characters, with a note of how many more there are."""
    if len(text) <= most:
        return visible(text)
    return f"{visible(text[:most])} … [cut: {len(text) - most:,} more characters]"


def short(text: str, most: int = 40) -> str:
    """One line of a name."""
    line = " ".join(visible(str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def size_of_model(parameters: int) -> str:
    """'7.6B', '135M', '51,872' parameters."""
    if parameters >= 1_000_000_000:
        return f"{parameters / 1e9:,.1f}B"
    return f"{parameters / 1e6:,.0f}M" if parameters >= 1_000_000 else f"{parameters:,}"


def counted(number: int, noun: str) -> str:
    """'1 row', '1,000 rows'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


STAGES = (
    "check",
    "gather",
    "prepare",
    "engine start",
    "score",
    "score windows",
    "select",
    "load kept rows",
    "score behavior",
    "weigh",
    "release",
    "report",
)


def in_order(stage_seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of stages in the order in which a run has them; JSON files have them by their names."""
    return dict(sorted(stage_seconds.items(), key=lambda item: STAGES.index(item[0]) if item[0] in STAGES else 99))


def nearest(name: str, known: Sequence[str], what: str = "there are", most: int = 1) -> str:
    """What was meant by a name that does not exist: the nearest that do, or all where none is near."""
    near = difflib.get_close_matches(name, known, n=most, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(one) for one in near)}?"
    return f"{what}: {', '.join(known)}"


def plot_labels(texts: Sequence[str], most: int = 24) -> list[str]:
    """Names in a plot, each another: long ones lose their middle, since the ends of model names tell them apart.
    plotly reads a little HTML in its texts."""
    found: list[str] = []
    for text in texts:
        line = short(text, 1 << 30)
        label = line if len(line) <= most else f"{line[: most // 2]}…{line[-(most - most // 2 - 1) :]}"
        label, number = html.escape(label), 2
        while label in found:
            label, number = f"{html.escape(line[: most - 4])}… ({number})", number + 1
        found.append(label)
    return found
