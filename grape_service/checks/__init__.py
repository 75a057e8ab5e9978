"""Data checks: which rows of a training set have something wrong with them, and what."""
