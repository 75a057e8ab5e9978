"""Which tokens are computed once: groups, budgets and the index that leads from packed places to losses."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grape_service.rows.ragged import TokenBatch
from workers.engines.transformers.packing import common_prefix_lens, group_rows, pack

ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=9), st.randoms(use_true_random=False)), max_size=12
)


def batch_of(rows: list[tuple[list[int], object]]) -> TokenBatch:
    """Rows of few distinct tokens, with loss at random places."""
    pairs = []
    for ids, random in rows:
        mask = [False] + [random.random() < 0.5 for _ in ids[1:]]  # type: ignore[attr-defined]
        mask[1] = mask[1] or not any(mask)
        pairs.append((ids, mask))
    return TokenBatch.from_rows(pairs)


def saved_tokens(shared: np.ndarray, cuts: tuple[int, ...]) -> int:
    """Tokens saved by cutting rows 0..N-1 at `cuts`."""
    bounds = [0, *cuts, len(shared) + 1]
    parts = [shared[begin : end - 1] for begin, end in pairwise(bounds)]
    return sum(len(part) * int(part.min()) for part in parts if len(part))


def test_common_prefix_lens() -> None:
    rows = [[5, 1, 2, 3], [5, 1, 2], [5, 1, 9, 9, 9], [4, 1, 9]]
    batch = TokenBatch.from_rows([(ids, [False] + [True] * (len(ids) - 1)) for ids in rows])
    assert common_prefix_lens(batch).tolist() == [3, 2, 0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_groups_save_as_much_as_any_cut_of_the_rows(shared_list: list[int]) -> None:
    shared = np.asarray(shared_list)
    groups = group_rows(shared)
    assert [begin for begin, _, _ in groups] == [0, *(end for _, end, _ in groups[:-1])]
    assert groups[-1][1] == len(shared) + 1
    chosen = tuple(begin for begin, _, _ in groups[1:])
    places = range(1, len(shared) + 1)
    best = max(saved_tokens(shared, cuts) for size in range(len(places) + 1) for cuts in combinations(places, size))
    assert saved_tokens(shared, chosen) == best
    assert sum((end - begin - 1) * prefix for begin, end, prefix in groups) == best


def test_candidates_are_shared_and_prompts_are_not_torn_apart() -> None:
    """Two prompts with a common system message: each keeps its own, longer, common beginning."""
    system = [1, 2, 3]
    rows = [system + [prompt] * 5 + [response] for prompt in (7, 8) for response in range(10, 14)]
    batch = TokenBatch.from_rows([(ids, [False] * 8 + [True]) for ids in rows])
    assert group_rows(common_prefix_lens(batch)) == [(0, 4, 8), (4, 8, 8)]


@given(ROWS.filter(len), st.integers(1, 40), st.booleans())
def test_every_loss_is_found_once_within_the_budget(rows: list, max_tokens: int, padded: bool) -> None:
    batch = batch_of(rows)
    seen = []
    targets = batch.input_ids[batch.mask]
    for packed in pack(batch, max_tokens, padded=padded):
        widest = max(group.num_tokens for group in packed.groups)
        tokens = widest * len(packed.groups) if padded else packed.num_tokens
        assert tokens <= max_tokens or sum(len(group.rows) for group in packed.groups) == 1
        assert packed.target_ids.tolist() == targets[packed.loss_index].tolist()
        flat = np.flatnonzero(batch.mask)[packed.loss_index]
        row = np.searchsorted(batch.offsets, flat, side="right") - 1
        assert packed.position_ids[packed.hidden_index].tolist() == (flat - batch.offsets[row] - 1).tolist()
        assert packed.input_ids[packed.hidden_index].tolist() == batch.input_ids[flat - 1].tolist()
        seen += packed.loss_index.tolist()
    assert sorted(seen) == list(range(len(targets)))


def test_kinds_never_meet() -> None:
    batch = TokenBatch.from_rows([([1, 2, 3], [False, True, True])] * 6)
    kinds = np.array([0, 0, 5, 0, 5, 5])
    packed = list(pack(batch, 1000, kinds))
    assert [sorted({int(kinds[row]) for group in p.groups for row in group.rows}) for p in packed] == [[0], [5]]


def test_no_rows() -> None:
    batch = TokenBatch.from_rows([([1, 2], [False, True])]).take([])
    assert list(pack(batch, 10)) == []
