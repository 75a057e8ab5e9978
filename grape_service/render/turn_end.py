"""The token that ends an assistant's turn."""

from __future__ import annotations

from grape_service.models.vocabulary import Vocabulary
from grape_service.render.encoding import Encoder
from grape_service.render.template import ChatTemplate


def find_turn_end(
    template: ChatTemplate | None, encoder: Encoder, vocabulary: Vocabulary, eos: int | None, stop_ids: set[int]
) -> int | None:
    """The first added token after an assistant's words; the one that begins the next role, where generation stops
    there; in plain mode, or without one, the end of text."""
    if template is not None:
        added = vocabulary.added
        for id_ in encoder.whole(template.after_response()).tolist():
            if id_ in added and not added[id_].isspace():
                return int(id_)
        following = encoder.whole(template.after_response(is_last=False)).tolist()[:1]
        if following and following[0] in stop_ids:
            return int(following[0])
    return None if eos is None else int(eos)
