"""Columns of rows, and fields of their responses, that mean something and are not read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from grape_service.pool.lines import beginning
from grape_service.pool.meanings import BY_NAME, MEDIA, Meaning
from grape_service.pool.messages import Unusable
from grape_service.rows.candidate import Message, Row

NEEDS_MEDIA = "needs images, video or sound"
PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:_[0-9]+|_pad)?\|?>", re.I)


class Unread:
    """What of the rows of a file is not read."""

    def __init__(self, prompts_alone: bool = False):
        """`prompts_alone`: what rows say of responses does not matter."""
        self.counts: dict[str, int] = {}
        """Rows and responses that have a column which means something and is not read, by the column."""
        self.names: set[str] = set()
        """Every column and field that was seen."""
        self._prompts_alone = prompts_alone
        self.meant: dict[str, Meaning] = {}
        """What is not read, by the column."""
        self.media: list[str] = []
        """Columns of what needs more than text."""

    def notice(self, names: Iterable[str], read: Collection[str]) -> None:
        """See which columns mean something; `read` are those that the config reads or carries."""
        for name in names:
            self.names.add(name)
            meaning = BY_NAME.get(name)
            if meaning is None or name in read or (self._prompts_alone and not meaning.is_of_prompt):
                continue
            if meaning is MEDIA:
                self.media.append(name)
            else:
                self.meant[name] = meaning

    def look(self, fields: Row) -> None:
        """Count those that a row or a response has a value in."""
        for name, meaning in self.meant.items():
            if name == "output_ids" and "meta_info" in fields:
                continue
            if name in fields and meaning.is_meant(fields[name]):
                self.counts[name] = self.counts.get(name, 0) + 1

    def refuse_media(self, fields: Row) -> None:
        """Raises Unusable for a candidate that needs more than text."""
        for name in self.media:
            if MEDIA.is_meant(fields.get(name)):
                raise Unusable(NEEDS_MEDIA, f"'{name}' is {beginning(str(fields[name]))[:60]}")

    def refuse_placeholders(self, prompt: list[Message]) -> None:
        """Raises Unusable for a prompt that shows an image, in rows with a column of images."""
        for message in prompt:
            if shown := PLACEHOLDER.search(message["content"]):
                raise Unusable(NEEDS_MEDIA, f"its prompt says {shown[0]}, beside the column '{self.media[0]}'")
