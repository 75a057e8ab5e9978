"""What `grape check` says of the tokens of a sample: lengths, proof, and what is likely not to be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson

from grape_service.pool.finish_reasons import is_known
from grape_service.render.proof import problem_of
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from grape_service.rows.messages import only_text

COMPARED_TEXTS = 256


def look_at_tokens(
    renderer: Renderer, candidates: list[Candidate], rendered: list[Rendered | Rejection], folder: str
) -> tuple[str, str]:
    """(status, detail) of a sample's tokens under the target, whose files are in `folder`."""
    good = [(c, r) for c, r in zip(candidates, rendered, strict=True) if isinstance(r, Rendered)]
    bad = [r for r in rendered if isinstance(r, Rejection)]
    if not good:
        return "error", f"no row of the sample can be rendered: {_words(bad[0])}"
    for candidate, row in good:
        problem = problem_of(renderer, candidate, row)
        if problem is not None:
            return "error", problem
    lengths = np.array([len(r.input_ids) for _, r in good])
    detail = f"{lengths.mean():.0f} tokens per row on average, {lengths.max()} at most; turn end {renderer.turn_end_id}"
    notes = [f"{len(bad)} rows cannot be rendered: {_words(bad[0])}"] if bad else []
    notes += [note for note in (_finish_reasons(candidates), _split(renderer, candidates, folder)) if note]
    notes += _thoughts(renderer, candidates)
    return ("warning" if notes else "ok"), "; ".join([detail, *notes])


def _words(rejection: Rejection) -> str:
    return f"{rejection.reason}{f' ({rejection.detail})' if rejection.detail else ''}"


def _finish_reasons(candidates: list[Candidate]) -> str | None:
    unknown = sorted({c.finish_reason for c in candidates if c.finish_reason and not is_known(c.finish_reason)})
    if not unknown:
        return None
    shown = ", ".join(f"'{word}'" for word in unknown[:5])
    return f"finish_reason has words that are not known ({shown}): such responses count as ended by the policy itself"


def _thoughts(renderer: Renderer, candidates: list[Candidate]) -> list[str]:
    """Responses without thoughts for a model whose generation prompt opens them."""
    texts = [text for c in candidates if (text := only_text(c.response)) is not None and c.response_ids is None]
    if not renderer.opens_thoughts or not texts:
        return []
    without = sum("</think>" not in text for text in texts)
    if not without:
        return []
    return [
        f"the generation prompt opens <think>, but {without} of {len(texts)} responses of the sample never close it: "
        "they are scored as thoughts; set the template's variable that turns thinking off in render.template_kwargs"
    ]


def _parts(tokenizer_json: bytes | str) -> list[Any]:
    """Those parts of a tokenizer that decide which ids a text gets."""
    state = orjson.loads(tokenizer_json)
    return [state.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]


def _split(renderer: Renderer, candidates: list[Candidate], folder: str) -> str | None:
    """Where transformers' tokenizer class splits the pool's text otherwise than the model's tokenizer.json does."""
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file() or _parts(path.read_bytes()) == _parts(renderer.tokenizer.backend_tokenizer.to_str()):
        return None
    own: Any = Tokenizer.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    used = renderer.tokenizer.backend_tokenizer
    texts = [text for c in candidates if (text := only_text(c.response)) is not None][:COMPARED_TEXTS]
    texts += [str(c.prompt[-1]["content"]) for c in candidates][:COMPARED_TEXTS]
    theirs, ours = (
        [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)] for backend in (own, used)
    )
    differ = [text for text, left, right in zip(texts, theirs, ours, strict=True) if left != right]
    if not differ:
        return None
    return (
        f"transformers' {type(renderer.tokenizer).__name__} splits {len(differ)} of {len(texts)} texts of the sample "
        f"otherwise than the model's tokenizer.json, such as {differ[0][:40]!r}: its tokens are used, as training does"
    )
