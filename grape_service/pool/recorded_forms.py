"""What servers and trainers record beside a response, in the forms that they use: log-probabilities, ids, masks."""

from __future__ import annotations

from typing import Any

from grape_service.pool.messages import Unusable, type_name
from grape_service.pool.values import numbers, said
from grape_service.rows.candidate import Row

RECORDED = "behavior_logprobs"
OTHER_IDS = "recorded log-probabilities are of other tokens"
OTHER_FORM = "recorded log-probabilities have an unknown form"
MASK_WITHOUT_IDS = "response_mask without response_ids"


def recorded_values(value: Any, ids: Any, mask: list[int] | None) -> list[Any] | None:
    """Recorded log-probabilities as numbers, null where one is not known. Raises Unusable."""
    kinds = {int, float, type(None)}
    return numbers(plain_logprobs(value, ids, mask), kinds, "recorded log-probabilities do not match response_ids")


def plain_logprobs(value: Any, ids: Any = None, mask: list[int] | None = None) -> Any:
    """Log-probabilities [L] of the tokens of a response, of one of the forms that servers give: OpenAI's
    {content: [{logprob}]}, {token_logprobs}, [{logprob}], SGLang's [[logprob, id, text]]. Others as they are.

    Where they name their tokens, these are found again among `ids`, those of the response, of which the policy wrote
    where `mask` is 1. Raises Unusable where they are others.
    """
    value = said(value)
    if isinstance(value, dict):
        content, flat = value.get("content"), value.get("token_logprobs")
        value = content if isinstance(content, list) else flat if isinstance(flat, list) else value
    pairs = _pairs(value)
    return value if pairs is None else _placed(pairs, said(ids), mask)


def _pairs(value: Any) -> list[tuple[Any, int | None]] | None:
    """(log-probability, token id) of each element of a list that says both; None for other lists. An element that is
    null is a token of which neither is known; an object may leave its id out."""
    if not isinstance(value, list) or all(one is None or not isinstance(one, dict | list) for one in value):
        return None
    pairs: list[tuple[Any, int | None]] = []
    for one in value:
        if one is None:
            pairs.append((None, None))
        elif isinstance(one, dict) and "logprob" in one:
            id_ = next((one[name] for name in ("id", "token_id") if type(one.get(name)) is int), None)
            pairs.append((one["logprob"], id_))
        elif isinstance(one, list) and 2 <= len(one) <= 3 and _is_pair(*one):
            pairs.append((one[0], int(one[1])))
        else:
            return None
    return pairs


def _is_pair(logprob: Any, id_: Any, text: Any = None) -> bool:
    """Whether these are a log-probability, the id of a token and its text. Parquet's lists of numbers make floats of
    ids, which the ids of the response then prove."""
    is_id = type(id_) is int or (type(id_) is float and id_.is_integer())
    is_number = logprob is None or type(logprob) in (int, float)
    return is_id and id_ >= 0 and is_number and (text is None or isinstance(text, str))


def _placed(pairs: list[tuple[Any, int | None]], ids: Any, mask: list[int] | None = None) -> list[Any]:
    """The log-probabilities of pairs [(log-probability, id)] at the places of their tokens among ids: as many as there
    are ids, or one more for a turn end behind them. Raises Unusable where the tokens are others."""
    logprobs, named = [logprob for logprob, _ in pairs], [id_ for _, id_ in pairs]
    if not isinstance(ids, list) or all(id_ is None for id_ in named):
        return logprobs
    if len(named) == len(ids) and all(one in (None, other) for one, other in zip(named, ids, strict=True)):
        return logprobs
    if mask is not None and named == [id_ for id_, written in zip(ids, mask, strict=False) if written]:
        left = iter(logprobs)
        return [next(left) if written else None for written in mask]
    if len(named) == len(ids) + 1:
        if named[1:] == ids and logprobs[0] is None:
            return logprobs[1:]
        if named[:-1] == ids:
            return logprobs if logprobs[0] is not None else logprobs[:-1]
    behind = len(ids) - len(named)
    found = [
        place
        for place in range(behind + 1)
        if ids[place] == named[0] and ids[place : len(ids) - behind + place] == named
    ]
    if found and (len(found) == 1 or behind == 1):
        return [*[None] * found[0], *logprobs, *[None] * (behind - found[0])]
    raise Unusable(OTHER_IDS, _difference(named, ids))


def _difference(named: list[int | None], ids: list[Any]) -> str:
    for place, (one, other) in enumerate(zip(named, ids, strict=False)):
        if one not in (None, other):
            return f"token {place} of the response is {other}, and its log-probability is that of {one}"
    return f"{len(named)} log-probabilities for {len(ids)} ids"


def mask_of(value: Any, ids: Any) -> list[int] | None:
    """Which of the response's ids the policy wrote, as 0 and 1; None where it wrote all of them. Raises Unusable."""
    value = said(value)
    if value is None:
        return None
    if not isinstance(value, list):
        raise Unusable("response_mask is not a list", f"it is {type_name(value)}")
    if not all(type(one) in (int, bool, float) and one in (0, 1) for one in value):
        raise Unusable("response_mask is not made of 0 and 1")
    ids = said(ids)
    if ids is None:
        if all(value):
            return None
        raise Unusable(MASK_WITHOUT_IDS, "it says which tokens the policy wrote, and there are none")
    if isinstance(ids, list) and len(value) != len(ids):
        raise Unusable("response_mask does not match response_ids", f"{len(value)} values for {len(ids)} ids")
    return None if all(value) else [int(one) for one in value]


def sglang_fields(fields: Row, theirs: dict[str, str]) -> dict[str, Any]:
    """What SGLang's meta_info says of a response, under the pool's names: why it ended, its ids and their
    log-probabilities. meta_info keeps the rest. Raises Unusable where these are of other tokens than its ids."""
    meta = said(fields["meta_info"])
    if not isinstance(meta, dict):
        return {}
    found: dict[str, Any] = {}
    if fields.get(theirs["finish_reason"]) is None and meta.get("finish_reason") is not None:
        found[theirs["finish_reason"]] = meta["finish_reason"]
    recorded = meta.get("output_token_logprobs")
    ids, given = said(fields.get("output_ids")), said(fields.get(theirs["response_ids"]))
    pairs = _pairs(recorded)
    if pairs:
        logprobs = _placed(pairs, ids)
        ids = [id_ for _, id_ in pairs] if ids is None else ids
        if fields.get(theirs[RECORDED]) is None:
            found[theirs[RECORDED]] = logprobs if given is None else _placed(pairs, given)
        found["meta_info"] = {name: value for name, value in meta.items() if name != "output_token_logprobs"}
    elif recorded:
        raise Unusable(OTHER_FORM, "meta_info.output_token_logprobs is no list of [log-probability, token id, text]")
    if ids is not None and given is None:
        found[theirs["response_ids"]] = ids
    return found
