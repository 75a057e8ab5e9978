"""Weights methods, one a module: a function of token statistics to one log weight a token."""
