"""Whether two policies can be compared token for token."""

from __future__ import annotations

import numpy as np

from grape_service.render.renderer import Renderer


def incompatible_ids(target: Renderer, behavior: Renderer, used_ids: np.ndarray) -> list[int]:
    """Those of `used_ids` that do not decode to the same bytes in both tokenizers, ascending.

    Turn-end tokens may differ between policies: leave them out of `used_ids`.
    """
    if target.tokenizer_digest() == behavior.tokenizer_digest():
        return []
    ids = np.unique(used_ids).tolist()
    pairs = zip(ids, target.token_bytes(ids), behavior.token_bytes(ids), strict=True)
    return [id_ for id_, ours, theirs in pairs if ours is None or ours != theirs]
