"""Renderers for rows that bring variables of the chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import orjson

from grape_service.errors import UserError
from grape_service.rows.candidate import Candidate, Rejection, Rendered

MAX_VARIANTS = 64
"""Renderers that are kept."""

AnyRenderer = TypeVar("AnyRenderer")


class Variants(Generic[AnyRenderer]):
    """The renderers that differ from one in variables of the template alone, made when rows bring them."""

    def __init__(self, renderer: AnyRenderer, make: Callable[[dict[str, Any]], AnyRenderer]):
        """`make` gives the renderer with some variables over those of the config, proved as `renderer` is."""
        self._renderer, self._make = renderer, make
        self._renderers: dict[bytes, AnyRenderer | UserError] = {}

    def of(self, candidate: Candidate) -> AnyRenderer:
        """The renderer of a candidate. Raises UserError where the template cannot be used with its variables."""
        if not candidate.template_kwargs:
            return self._renderer
        key = orjson.dumps(candidate.template_kwargs, option=orjson.OPT_SORT_KEYS)
        if key not in self._renderers:
            if len(self._renderers) >= MAX_VARIANTS:
                self._renderers.clear()
            try:
                self._renderers[key] = self._make(candidate.template_kwargs)
            except UserError as error:
                self._renderers[key] = error
        found = self._renderers[key]
        if isinstance(found, UserError):
            raise found
        return found

    def each(
        self,
        candidates: Sequence[Candidate],
        render: Callable[[AnyRenderer, list[int]], list[Rendered | Rejection]],
    ) -> list[Rendered | Rejection]:
        """Each candidate rendered by its own renderer: `render` gets one and the places of its candidates."""
        places: dict[int, tuple[AnyRenderer, list[int]]] = {}
        results: list[Rendered | Rejection] = [Rejection("not rendered")] * len(candidates)
        for place, candidate in enumerate(candidates):
            try:
                own = self.of(candidate)
            except UserError as error:
                results[place] = Rejection("chat_template_kwargs cannot be used", str(error))
                continue
            places.setdefault(id(own), (own, []))[1].append(place)
        for own, chosen in places.values():
            for place, result in zip(chosen, render(own, chosen), strict=True):
                results[place] = result
        return results
