"""PEAR weights: by hand, against a float64 loop, and by property."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.config.methods import WeightsConfig
from grape_service.errors import UserError
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.weigh.counts import WeighCounts, dataset_factor
from grape_service.weigh.pear import TokenWeights, WeightTotals, log_ratios, pear_weights, totals_by_group

pytestmark = pytest.mark.quick

WIDE = {"ratio_clip": (-1e6, 1e6), "weight_clip": (-600.0, 600.0)}


def slow_weights(ratios: list[float], config: WeightsConfig) -> list[float]:
    """One response by the equations of the paper, in float64, with t from 1 to T as they have it."""
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    mean = math.fsum(known) / len(known) if known and config.center == "sequence" else 0.0
    low, high = config.ratio_clip
    delta = [0.0 if math.isnan(ratio) else min(max(ratio - mean, low), high) for ratio in ratios]
    num_tokens = len(delta)
    weights = []
    for t in range(1, num_tokens + 1):
        if config.level == "sequence":
            log_weight = math.fsum(delta)
        else:
            size = config.block_size if config.level == "block" else 1
            end = min(math.ceil(t / size) * size, num_tokens)
            log_weight = (num_tokens - end) * math.log(config.gamma) + math.fsum(delta[end:])
        weights.append(math.exp(min(max(log_weight, config.weight_clip[0]), config.weight_clip[1])))
    if weights and config.normalize == "sequence":
        scale = len(weights) / math.fsum(weights)
        weights = [weight * scale for weight in weights]
    return weights


def weigh(rows: list[list[float]], **settings) -> list[np.ndarray]:
    offsets = offsets_from_lengths([len(row) for row in rows])
    flat = np.array([value for row in rows for value in row], dtype=np.float64)
    pear = pear_weights(flat, offsets, WeightsConfig(**settings))
    return np.split(pear.weights, offsets[1:-1])


# By hand: delta = 0.1, 0.2, -0.05 and gamma 0.5, nothing clipped.


def test_token_level_by_hand():
    [weights] = weigh([[0.1, 0.2, -0.05]], gamma=0.5)
    # t = 1: gamma^2 exp(0.2 - 0.05); t = 2: gamma exp(-0.05); t = 3: 1
    np.testing.assert_allclose(weights, [0.25 * math.exp(0.15), 0.5 * math.exp(-0.05), 1.0], rtol=1e-9)


def test_block_level_by_hand():
    [weights] = weigh([[0.1, 0.2, -0.05, 0.3, 0.25]], level="block", block_size=2, gamma=0.5)
    # Blocks (1,2), (3,4), (5): e = 2, 4, 5. Block 1: gamma^3 exp(-0.05+0.3+0.25); block 2: gamma exp(0.25); block 3: 1
    first, second = 0.125 * math.exp(0.5), 0.5 * math.exp(0.25)
    np.testing.assert_allclose(weights, [first, first, second, second, 1.0], rtol=1e-9)


def test_sequence_level_by_hand():
    [weights] = weigh([[0.1, 0.2, -0.05]], level="sequence", gamma=0.5)
    np.testing.assert_allclose(weights, [math.exp(0.25)] * 3, rtol=1e-9)


def test_both_clips_by_hand():
    rows = [[5.0, -5.0, 5.0]]
    offsets = np.array([0, 3])
    pear = pear_weights(
        np.array(rows[0]), offsets, WeightsConfig(gamma=1.0, ratio_clip=(-0.08, 0.3), weight_clip=(-10.0, 0.25))
    )
    # Deltas 0.3, -0.08, 0.3; log G = 0.22, 0.3 -> 0.25, 0
    np.testing.assert_allclose(pear.weights, np.exp([0.22, 0.25, 0.0]), rtol=1e-9)
    assert (pear.ratio_low[0], pear.ratio_high[0]) == (1, 2)
    assert (pear.weight_low[0], pear.weight_high[0]) == (0, 1)


def test_center_by_hand():
    [weights] = weigh([[1.0, 1.2, 1.1]], center="sequence", gamma=1.0, **{"ratio_clip": (-1, 1)})
    # The mean of 1.1 goes: -0.1, 0.1, 0
    np.testing.assert_allclose(weights, np.exp([0.1, 0.0, 0.0]), rtol=1e-9)


def test_an_unknown_ratio_has_a_delta_of_zero():
    nan = float("nan")
    [weights] = weigh([[1.0, 1.2, nan]], center="sequence", gamma=1.0)
    np.testing.assert_allclose(weights, np.exp([0.1, 0.0, 0.0]), rtol=1e-9)  # mean 1.1 of the two that are known
    [weights] = weigh([[0.1, nan, 0.2]], gamma=1.0)
    np.testing.assert_allclose(weights, np.exp([0.2, 0.2, 0.0]), rtol=1e-9)
    [weights] = weigh([[nan, nan]], center="sequence", gamma=1.0)
    assert weights.tolist() == [1.0, 1.0]


def test_normalize_by_hand():
    [weights] = weigh([[0.0, 0.0]], gamma=0.5, normalize="sequence")
    np.testing.assert_allclose(weights, [2 / 3, 4 / 3], rtol=1e-12)


def test_the_papers_settings_are_the_defaults():
    config = WeightsConfig()
    assert (config.level, config.gamma, config.block_size) == ("token", 0.999, 4)
    assert config.ratio_clip == (-0.08, 0.3)
    assert config.weight_clip == (-10.0, 5.0)
    assert (config.center, config.normalize) == ("none", "none")


ROWS = st.lists(
    st.lists(st.one_of(st.floats(-3, 3), st.just(float("nan"))), min_size=0, max_size=40), min_size=1, max_size=12
)
SETTINGS = st.fixed_dictionaries(
    {
        "level": st.sampled_from(["token", "block", "sequence"]),
        "gamma": st.sampled_from([1.0, 0.999, 0.9]),
        "block_size": st.integers(1, 50),
        "ratio_clip": st.sampled_from([(-0.08, 0.3), (-1.0, 1.0), (-100.0, 100.0)]),
        "weight_clip": st.sampled_from([(-10.0, 5.0), (-0.5, 0.5), (-200.0, 200.0)]),
        "center": st.sampled_from(["none", "sequence"]),
        "normalize": st.sampled_from(["none", "sequence", "dataset"]),
    }
).filter(lambda chosen: chosen["level"] != "sequence" or (chosen["center"], chosen["normalize"]) == ("none", "none"))


@settings(max_examples=200)
@given(ROWS, SETTINGS)
def test_weights_equal_a_float64_loop(rows, chosen):
    for weights, row in zip(weigh(rows, **chosen), rows, strict=True):
        np.testing.assert_allclose(weights, slow_weights(row, WeightsConfig(**chosen)), rtol=1e-8)


def test_long_responses_equal_a_float64_loop():
    """Ten million tokens before a response do not blur its sums: exact, and the same bit for bit as alone."""
    generator = np.random.default_rng(1)
    lengths = [*[100_000] * 30, 7, 1, 4096]
    offsets = offsets_from_lengths(lengths)
    ratios = generator.normal(0.05, 0.2, offsets[-1])
    config = WeightsConfig(weight_clip=(-1e4, 600.0), ratio_clip=(-0.3, 0.3))
    weights = pear_weights(ratios, offsets, config).weights
    for row in (0, 29, 30, 31, 32):
        values = ratios[offsets[row] : offsets[row + 1]]
        if len(values) > 5000:  # the suffix sums of a loop, without its quadratic cost
            delta = np.clip(values, -0.3, 0.3)
            later = np.cumsum(delta[::-1].astype(np.longdouble))[::-1] - delta
            remaining = np.arange(len(values))[::-1]
            expected = np.exp(np.clip(remaining * np.log(0.999) + later, -1e4, 600)).astype(np.float64)
            np.testing.assert_allclose(weights[offsets[row] : offsets[row + 1]], expected, rtol=1e-6)
        else:
            np.testing.assert_allclose(
                weights[offsets[row] : offsets[row + 1]], slow_weights(values, config), rtol=1e-8
            )
        alone = pear_weights(values.copy(), np.array([0, len(values)]), config).weights
        np.testing.assert_array_equal(weights[offsets[row] : offsets[row + 1]], alone)


FREE = st.lists(st.floats(-2, 2), min_size=1, max_size=30)
LEVELS = st.sampled_from([{"level": "token"}, {"level": "block", "block_size": 3}])


@given(FREE, st.sampled_from([1.0, 0.999, 0.9]))
def test_blocks_of_one_token_are_the_token_level(row, gamma):
    [block] = weigh([row], level="block", block_size=1, gamma=gamma, **WIDE)
    [token] = weigh([row], level="token", gamma=gamma, **WIDE)
    np.testing.assert_array_equal(block, token)


@given(FREE, st.integers(0, 5), st.sampled_from([1.0, 0.999]))
def test_one_block_over_all_weighs_1_everywhere(row, more, gamma):
    [weights] = weigh([row], level="block", block_size=len(row) + more, gamma=gamma, **WIDE)
    assert (weights == 1).all()


@given(FREE, LEVELS, st.sampled_from([1.0, 0.999, 0.5]))
def test_the_last_token_weighs_1(row, level, gamma):
    [weights] = weigh([row], gamma=gamma, **level, **WIDE)
    assert weights[-1] == 1


@given(st.integers(1, 300), LEVELS, st.sampled_from([1.0, 0.999, 0.95]))
def test_equal_policies_give_pure_powers_of_gamma(num_tokens, level, gamma):
    [weights] = weigh([[0.0] * num_tokens], gamma=gamma, **level, **WIDE)
    size = level.get("block_size", 1)
    ends = [min(math.ceil(t / size) * size, num_tokens) for t in range(1, num_tokens + 1)]
    np.testing.assert_allclose(weights, [gamma ** (num_tokens - end) for end in ends], rtol=1e-10)


@given(ROWS, SETTINGS)
def test_the_clip_bounds_hold(rows, chosen):
    low, high = chosen["weight_clip"]
    for weights in weigh(rows, **{**chosen, "normalize": "none"}):
        assert (weights >= math.exp(low)).all()
        assert (weights <= math.exp(high)).all()


@given(ROWS.filter(any), LEVELS)
def test_the_mean_is_1_after_normalize_sequence(rows, level):
    for weights, row in zip(weigh(rows, normalize="sequence", **level), rows, strict=True):
        if row:
            assert weights.mean() == pytest.approx(1.0, rel=1e-12)


@settings(max_examples=50)
@given(ROWS, SETTINGS, st.randoms(use_true_random=False))
def test_neighbours_never_change_a_weight(rows, chosen, random):
    places = random.sample(range(len(rows)), len(rows))
    for weights, place in zip(weigh([rows[place] for place in places], **chosen), places, strict=True):
        np.testing.assert_array_equal(weights, weigh([rows[place]], **chosen)[0])


@given(ROWS, SETTINGS)
def test_clip_counts_equal_a_loop(rows, chosen):
    config = WeightsConfig(**{**chosen, "center": "none"})
    offsets = offsets_from_lengths([len(row) for row in rows])
    pear = pear_weights(np.array([value for row in rows for value in row]), offsets, config)
    for place, row in enumerate(rows):
        assert pear.ratio_low[place] == sum(value < config.ratio_clip[0] for value in row)
        assert pear.ratio_high[place] == sum(value > config.ratio_clip[1] for value in row)


def test_totals_add_up():
    rows = [[0.1, 0.2], [0.5], [-1.0, 0.0, 0.3]]
    offsets = offsets_from_lengths([2, 1, 3])
    pear = pear_weights(np.array([value for row in rows for value in row]), offsets, WeightsConfig())
    first, second, empty = totals_by_group(pear, offsets, np.array([0, 1, 0]), 3)
    assert (first.rows, first.tokens, second.rows, second.tokens) == (2, 5, 1, 1)
    assert (empty.rows, empty.tokens) == (0, 0)
    assert math.isnan(empty.mean)
    both = first + second + empty
    assert both.sum == pytest.approx(pear.weights.sum())
    expected = pear.weights.sum() ** 2 / (6 * (pear.weights**2).sum())
    assert both.effective_share == pytest.approx(expected)
    assert both.clip_shares() == {"ratio_low": 1 / 6, "ratio_high": 1 / 6, "weight_low": 0, "weight_high": 0}
    assert WeightTotals.from_json(both.to_json()) == both
    stored = WeightTotals.from_json(both.to_json())  # what is added to it is added to all that it held
    assert (stored + both).sum == (both + stored).sum == pytest.approx(2 * both.sum, rel=1e-15)
    assert (stored + WeightTotals()).sum == (WeightTotals() + stored).sum == both.sum


@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_totals_are_the_same_in_any_order_and_any_batches(lengths, random):
    rng = np.random.default_rng(random.randrange(2**32))
    rows = [rng.normal(0, 2, length) for length in lengths]
    found = set()
    for _ in range(3):
        random.shuffle(rows)
        cut = random.randrange(1, len(rows))
        totals = WeightTotals()
        for batch in (rows[:cut], rows[cut:]):
            offsets = offsets_from_lengths([len(row) for row in batch])
            pear = pear_weights(np.concatenate(batch), offsets, WeightsConfig(method="pear", level="token", gamma=0.9))
            totals += totals_by_group(pear, offsets, np.zeros(len(batch), dtype=np.int64), 1)[0]
        found.add(totals.sum)
    assert len(found) == 1


@pytest.mark.parametrize("low", [-80, -30, -10, 3])
@pytest.mark.parametrize("rows", [1, 1000])
def test_the_factor_of_a_dataset_makes_the_mean_1_at_any_weight(low, rows):
    config = WeightsConfig(level="sequence", normalize="dataset", weight_clip=(low, 5), ratio_clip=(-100, 1))
    ratios, offsets = np.full(2 * rows, -50.0), np.arange(rows + 1) * 2
    pear = pear_weights(ratios, offsets, config)
    counts = WeighCounts()
    half = rows // 2
    for start, stop in ((0, half), (half, rows)):  # two partitions
        part = TokenWeights(pear.weights[2 * start : 2 * stop], *(held[start:stop] for held in pear.held()))
        sources = {"a": totals_by_group(part, np.arange(stop - start + 1) * 2, np.zeros(stop - start, np.int64), 1)[0]}
        counts += WeighCounts(sources=sources)
    assert pear.weights.mean() * dataset_factor(counts, config) == pytest.approx(1, rel=1e-12)


def test_sums_that_differ_by_many_orders_of_magnitude_are_exact():
    values = np.array([1e-30, 1e30, 3.0, 1e-300, 2.0**-1074, 1e300])
    found = set()
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0, 4, 1, 3]):
        total = WeightTotals()
        for value in values[order]:
            held = np.zeros(1, np.int64)
            weights = TokenWeights(np.array([value]), held, held, held, held)
            total += totals_by_group(weights, np.array([0, 1]), held, 1)[0]
        found.add(total.sum)
    assert found == {math.fsum(values)}


def test_equal_weights_have_an_effective_share_of_1():
    pear = pear_weights(np.zeros(10), np.array([0, 4, 10]), WeightsConfig(gamma=1.0))
    [totals] = totals_by_group(pear, np.array([0, 4, 10]), np.array([0, 0]), 1)
    assert totals.effective_share == pytest.approx(1.0)
    assert totals.mean == 1.0


def test_noise_drifts_upwards_through_the_lopsided_clip():
    """What design.md says of bf16: noise of 0.05 per token adds about 0.001 to each delta and cancels gamma."""
    noise = np.random.default_rng(0).normal(0.0, 0.05, 400_000)
    pear = pear_weights(noise, np.array([0, len(noise)]), WeightsConfig(gamma=1.0, weight_clip=(-1e9, 1e9)))
    assert np.log(pear.weights[0]) / len(noise) == pytest.approx(0.00116, abs=0.0003)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_target_score_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        log_ratios(np.array([-1.0, bad]), np.array([-1.0, -1.0]))


def test_an_unknown_behavior_is_no_ratio_and_an_infinite_one_is_refused():
    assert np.isnan(log_ratios(np.array([-1.0]), np.array([np.nan]))).all()
    with pytest.raises(ValueError, match="finite"):
        log_ratios(np.array([-1.0]), np.array([-np.inf]))


def test_clips_without_bounds_are_refused_where_they_break():
    with pytest.raises(UserError, match="weight_clip"):
        weigh([[1.0] * 1000], ratio_clip=(-2, 2), weight_clip=(-10.0, math.inf))
    with pytest.raises(UserError, match="ratio_clip"):
        weigh([[1e9, 0.0]], ratio_clip=(-math.inf, math.inf))
