"""Gather: candidates that are sampled here, with log-probabilities that can be trusted."""
