"""How many rows and tokens a pool has, counted exactly or estimated from random parts of its files."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grape_service.config.methods import SelectConfig
from grape_service.config.schema import Config
from grape_service.estimate.windows import windows_of_rendered
from grape_service.pool.contract import group_contracts
from grape_service.pool.file_candidates import FileCandidates
from grape_service.pool.files import PoolFile
from grape_service.pool.outcomes import Accepted, Filtered
from grape_service.pool.reader import Segment
from grape_service.prepare.plan import sized_segments
from grape_service.prepare.result import Prepared
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered, RendersCandidates

PART_BYTES = 256 * 2**10
"""Size of a part that is read."""
SAMPLED_PARTS = 64
MAX_SEGMENTS = 1024
"""Of a pool with more segments, parts are drawn from so many random ones."""
BATCH_ROWS = 256


@dataclass(frozen=True)
class Survey:
    """Counts of a pool; of a sample, with the half width of the 95% interval as a share of each count."""

    rows: float
    prompts: float
    tokens: float
    loss_tokens: float
    rejected: float
    filtered: float
    exact: bool
    sources: dict[str, float]
    """Rows by source; rows without one are not among them."""
    token_error: float = 0.0  # share of `tokens`
    parts_read: int = 0
    parts: int = 0
    windows: float = 0.0
    """Rows that a select method scores beside them."""
    window_tokens: float = 0.0

    def how(self) -> str:
        """In words: exact, or from how much of the pool and how well."""
        if self.exact:
            return "counted exactly"
        return (
            f"estimated from {self.parts_read:,} random parts of about {self.parts:,}; "
            f"tokens are within ±{100 * self.token_error:.1f}% (95%)"
        )


def survey_pool(
    files: tuple[PoolFile, ...], config: Config, renderer: RendersCandidates, exact: bool = False, seed: int = 0
) -> Survey:
    """Count a pool. Pools of at most SAMPLED_PARTS parts, or with `exact`, are read whole.

    Of larger pools SAMPLED_PARTS parts are drawn; counts are scaled by bytes (a ratio estimate, its error from the
    spread between parts).
    """
    draw = random.Random(seed)
    segments = list(sized_segments(files, config))
    total_bytes = float(sum(size for _, size in segments))
    if not exact and len(segments) > MAX_SEGMENTS:
        segments = draw.sample(segments, MAX_SEGMENTS)
    sized = [(segment, size) for whole in segments for segment, size in _parts(files, *whole)]
    everything = exact or len(sized) <= SAMPLED_PARTS
    chosen = sized if everything else draw.sample(sized, SAMPLED_PARTS)
    contracts = group_contracts(files, config)
    prompts: set[str] = set()
    by_source: Counter[str] = Counter()
    into = renderer, prompts, by_source, config.select
    counts = np.array(
        [
            _count(FileCandidates(config, file, segment, contracts[file.group]), *into)
            for file, segment in ((files[segment.file], segment) for segment, _ in chosen)
        ]
    )
    totals = counts.sum(axis=0) if len(counts) else np.zeros(7)
    if everything:
        rows, tokens, loss, rejected, filtered, *windows = totals.tolist()
        found = (rows, len(prompts), tokens, loss, rejected, filtered)
        return Survey(*found, True, dict(by_source), 0.0, len(chosen), len(sized), *windows)
    sizes = np.array([size for _, size in chosen], dtype=float)
    scale = total_bytes / float(sizes.sum())
    error = ratio_error(counts[:, 1], sizes, len(sized))
    rows, tokens, loss, rejected, filtered, *windows = (totals * scale).tolist()
    estimated = (rows, len(prompts) * scale, tokens, loss, rejected, filtered)
    sources = {source: count * scale for source, count in by_source.items()}
    return Survey(*estimated, False, sources, error, len(chosen), len(sized), *windows)


def survey_of_prepared(prepared: Prepared) -> Survey:
    """The counts of a pool that is prepared."""
    counts = (prepared.rows, prepared.prompts, prepared.tokens, prepared.loss_tokens)
    rejected = prepared.rejects.total + prepared.left_out.total
    sources = {source: float(rows) for source, rows in prepared.sources.items()}
    return Survey(*counts, rejected, prepared.filtered, exact=True, sources=sources)


def ratio_error(values: np.ndarray, sizes: np.ndarray, num_parts: int) -> float:
    """Half width of the 95% interval of sum(values) / sum(sizes), as a share of it; parts drawn without replacement."""
    if values.sum() == 0 or len(values) < 2:
        return float("inf")
    ratio = values.sum() / sizes.sum()
    residuals = values - ratio * sizes
    variance = (1 - len(values) / num_parts) * residuals.var(ddof=1) / len(values)
    return float(1.96 * np.sqrt(variance) / values.mean())


def _parts(files: tuple[PoolFile, ...], segment: Segment, size: int) -> Iterator[tuple[Segment, int]]:
    """A segment of a plain .jsonl in parts of PART_BYTES, of a .parquet by row groups; others as they are."""
    if files[segment.file].format == ".jsonl" and segment.end is not None:
        for start in range(segment.start, segment.end, PART_BYTES):
            end = min(start + PART_BYTES, segment.end)
            yield Segment(segment.file, start, end), end - start
    elif files[segment.file].format == ".parquet" and segment.end is not None:
        groups = segment.end - segment.start
        for group in range(segment.start, segment.end):
            yield Segment(segment.file, group, group + 1), size // groups
    else:
        yield segment, size


def _count(
    candidates: FileCandidates,
    renderer: RendersCandidates,
    prompts: set[str],
    by_source: Counter[str],
    select: SelectConfig,
) -> tuple[int, int, int, int, int, int, int]:
    """(rows, tokens, tokens with loss, rejected, filtered, windows, their tokens) of a part; adds its prompts, and its
    rows by source."""
    rows = tokens = loss = rejected = filtered = windows = window_tokens = 0
    reader = candidates.rows()
    while batch := list(itertools.islice(reader, BATCH_ROWS)):
        accepted: list[Candidate] = []
        for _, row in batch:
            for item in [row] if isinstance(row, Rejection) else candidates.normaliser.candidates(row):
                if isinstance(item, Accepted):
                    accepted.append(item.candidate)
                elif isinstance(item, Filtered):
                    filtered += 1
                else:
                    rejected += 1
        rendered = renderer.render(accepted)
        if select.windows is not None:
            assert isinstance(renderer, Renderer), "steps are cut in what a tokenizer's ids decode to"
            usable = [one for one in rendered if isinstance(one, Rendered)]
            found = windows_of_rendered(usable, renderer.vocabulary, select)
            windows, window_tokens = windows + found[0], window_tokens + found[1]
        for candidate, result in zip(accepted, rendered, strict=True):
            if isinstance(result, Rejection):
                rejected += 1
                continue
            rows += 1
            tokens += len(result.input_ids)
            loss += int((np.asarray(result.loss_mask) > 0).sum())
            prompts.add(candidate.prompt_id)
            if candidate.source is not None:
                by_source[candidate.source] += 1
    return rows, tokens, loss, rejected, filtered, windows, window_tokens
