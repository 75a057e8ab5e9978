"""PEAR's weights and the sums over them, under the names that other programs import."""

from grape_service.methods.base import TokenWeights
from grape_service.methods.weights.pear import FIXED_POINT, PearKeys, log_ratios, pear_weights
from grape_service.weigh.totals import WeightTotals, totals_by_group

__all__ = ["FIXED_POINT", "PearKeys", "TokenWeights", "WeightTotals", "log_ratios", "pear_weights", "totals_by_group"]
