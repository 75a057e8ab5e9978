import itertools
import math

import numpy as np
import pytest
import torch

from grape_service.config.methods import WeightsConfig
from grape_service.config.training import SftSettings
from grape_service.errors import UserError
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.weigh.pear import log_ratios, pear_weights
from tests.workers.training.tiny_release import slow_weights
from workers.training.trainers.loss import LossTotals, online_weights_n, pear_weights_n, token_losses_n

CONFIGS = [
    WeightsConfig(),
    WeightsConfig(level="sequence"),
    WeightsConfig(level="block", block_size=4),
    WeightsConfig(level="block", block_size=1),
    WeightsConfig(center="sequence"),
    WeightsConfig(normalize="sequence", gamma=0.9),
    WeightsConfig(level="block", block_size=3, center="sequence", normalize="sequence", ratio_clip=(-1, 1)),
    WeightsConfig(weight_clip=(-0.1, 0.1)),
]
LENGTHS = [1, 7, 3, 40, 12]


def random_scores(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target, behavior = -rng.exponential(1.0, (2, sum(LENGTHS))).astype(np.float32)
    behavior[[7, 20]] = np.nan
    return target, behavior


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weights_in_torch_are_those_of_the_release_and_of_the_plain_formula(config: WeightsConfig) -> None:
    target, behavior = random_scores(1)
    offsets = offsets_from_lengths(LENGTHS)
    sequence_n = torch.from_numpy(np.repeat([0, 1, 4, 5, 9], LENGTHS))
    found = pear_weights_n(torch.from_numpy(target), torch.from_numpy(behavior), sequence_n, config).numpy()

    released = pear_weights(log_ratios(target, behavior), offsets, config).weights
    np.testing.assert_allclose(found, released, rtol=1e-6)
    for start, end in itertools.pairwise(offsets):
        plain = slow_weights(target[start:end].tolist(), behavior[start:end].tolist(), config)
        np.testing.assert_allclose(found[start:end], plain, rtol=1e-6)


def test_weights_carry_no_gradient() -> None:
    target, behavior = random_scores(2)
    target_n = torch.from_numpy(target).requires_grad_()
    weights_n = pear_weights_n(target_n, torch.from_numpy(behavior), torch.zeros(len(target)), WeightsConfig())
    assert not weights_n.requires_grad


def test_dft_multiplies_by_a_constant_probability() -> None:
    log_probs_n = torch.tensor([-0.1, -2.0], dtype=torch.float64, requires_grad=True)
    losses_n = token_losses_n(log_probs_n, "dft")
    losses_n.sum().backward()
    probabilities = log_probs_n.detach().exp()
    torch.testing.assert_close(losses_n.detach(), -log_probs_n.detach() * probabilities)
    assert log_probs_n.grad is not None
    torch.testing.assert_close(log_probs_n.grad, -probabilities)


def test_totals_are_means_over_tokens_and_the_effective_sample_size() -> None:
    totals = LossTotals()
    for weights in ([1.0, 3.0], [2.0]):
        w = torch.tensor(weights)
        zeros = torch.zeros(len(w))
        totals.add(w * 2.0, zeros - 2.0, w, zeros + 0.5, zeros == 0, 10)
    figures = totals.figures(all_reduce=False)
    assert figures["weighted_loss"] == pytest.approx(4.0)
    assert figures["nll"] == pytest.approx(2.0)
    assert figures["ess"] == pytest.approx(36 / (3 * 14))
    assert (figures["weight_min"], figures["weight_max"]) == (1.0, 3.0)
    assert (figures["loss_tokens"], figures["tokens"]) == (3, 20)
    assert totals.figures(all_reduce=False) == {}


def test_probability_weights_are_made_again_from_the_models_own_log_p() -> None:
    log_probs_n = torch.tensor([-0.5, -20.0, 0.0, -1.0, -2.0], requires_grad=True)
    sequence_n = torch.tensor([0, 0, 0, 1, 1])
    unknown_n = torch.full((5,), torch.nan)
    weights_n = online_weights_n(log_probs_n, unknown_n, sequence_n, WeightsConfig(method="probability"))
    assert not weights_n.requires_grad
    assert weights_n.tolist() == pytest.approx([math.exp(v) for v in (-0.5, -10.0, 0.0, -1.0, -2.0)])
    normalized = WeightsConfig(method="probability", normalize="sequence")
    weights_n = online_weights_n(log_probs_n, unknown_n, sequence_n, normalized)
    assert [weights_n[:3].mean().item(), weights_n[3:].mean().item()] == pytest.approx([1.0, 1.0])
    # nll with these weights is the loss of DFT.
    plain = token_losses_n(log_probs_n, "nll") * online_weights_n(
        log_probs_n, unknown_n, sequence_n, WeightsConfig(method="probability", weight_clip=(-100, 5))
    )
    assert plain.tolist() == pytest.approx(token_losses_n(log_probs_n, "dft").tolist())


def test_what_cannot_be_made_again_is_refused() -> None:
    from workers.training.trainers.sft import online_config

    settings = SftSettings(loss="online")
    assert online_config(settings, {"weights": {"method": "probability"}}).method == "probability"
    for method in ("entropy", "own_method:surprising_places"):
        with pytest.raises(UserError, match="cannot make weights of method"):
            online_config(settings, {"weights": {"method": method}})


@pytest.mark.parametrize("gamma", [0.999, 0.9])
@pytest.mark.parametrize("level", ["token", "block"])
def test_online_weights_of_a_long_response_are_those_of_the_column(gamma: float, level: str) -> None:
    """What gamma takes away the ratios give back, so that all digits of (T - t) * log(gamma) count."""
    length = 128_000
    config = WeightsConfig(gamma=gamma, ratio_clip=(-1, 1), level=level)
    target = torch.full((length,), -1.0, dtype=torch.float64)
    behavior = target + np.log(gamma)
    online = pear_weights_n(target, behavior, torch.zeros(length, dtype=torch.int64), config).double().numpy()
    column = pear_weights((target - behavior).numpy(), np.array([0, length]), config).weights
    np.testing.assert_allclose(online, column, rtol=2e-6)
