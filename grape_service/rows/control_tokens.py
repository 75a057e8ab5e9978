"""Control tokens of chat templates, spelled out: in a pool's text they are traces of a rendering, not words.

A tokenizer's own special tokens are known to its renderer; these are those of other models, from which pools come.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end|>",
    "<|return|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|EOT|>",
    "<end_of_turn>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    "</s>",
    "<eos>",
)
"""Behind a response, nothing but its end."""
MARKUP = ("</s>", "<eos>")
"""Turn ends that are also markup of other texts: only at the end of a text are they control tokens."""
HEADERS = (
    "<|im_start|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|begin_of_text|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|START_OF_TURN_TOKEN|>",
    "<start_of_turn>",
    "<|turn>",
    "<｜begin▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "[INST]",
    "[/INST]",
    "[gMASK]",
    "]~b]",
)
"""What opens a message, or stands in its header."""


class Traces:
    """Parts of control tokens, quick to look for in texts that mostly hold none.

    They are kept by one of their characters, a rare one where they have it: a text without it has none of them.
    """

    RARE = "|｜~<]["

    def __init__(self, traces: Iterable[str]):
        by_character: dict[str, list[str]] = {}
        for trace in sorted(set(traces)):
            rare = next((character for character in self.RARE if character in trace), trace[:1])
            by_character.setdefault(rare, []).append(trace)
        self._by_character = list(by_character.items())

    def are_in(self, text: str) -> bool:
        """Whether a text holds one of them."""
        for character, traces in self._by_character:
            if character in text:
                for trace in traces:
                    if trace in text:
                        return True
        return False


_TRACES = Traces(("<|", "<｜", "|>", "_of_turn>", "INST]", "[gMASK]", "]~b]", "[e~["))
"""Each of the tokens but MARKUP holds one of these."""
_SPELLED = re.compile("|".join(re.escape(token) for token in (*TURN_ENDS, *HEADERS) if token not in MARKUP))
_END = re.compile(rf"\s*(?:(?:{'|'.join(map(re.escape, TURN_ENDS))})\s*)+\Z")
_OPENING = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|\[gMASK\](?:<sop>)?|\]~!b\[)?\s*"
    r"(?:<\|im_start\|>\s*\w+|<\|im_(?:user|system)\|>|<\|start_header_id\|>|<\|header_start\|>|<start_of_turn>|<\|turn>"
    r"|<\|(?:user|system|assistant)\|>|<\|start\|>\s*\w+|<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>"
    r"|<｜(?:User|Assistant)｜>|\[INST\]|\]~b\])"
)


def without_turn_ends(text: str) -> str:
    """A response without the turn ends that are spelled out at its end, and white space around them."""
    if not text.rstrip().endswith(TURN_ENDS):
        return text
    found = _END.search(text)
    if found is None or ("<s>" in text and "</s>" in found[0]):
        return text
    return text[: found.start()]


def spelled_token(text: str) -> str | None:
    """A control token that stands spelled out in a text, or None."""
    if not _TRACES.are_in(text):
        return None
    found = _SPELLED.search(text)
    return found[0] if found else None


def rendered_opening(text: str) -> str | None:
    """The header with which a text begins that a chat template has rendered; None for other texts."""
    found = _OPENING.match(text) if _TRACES.are_in(text) else None
    return found[0].strip() if found else None
