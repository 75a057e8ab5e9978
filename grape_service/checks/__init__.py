"""Data checks: who is touched by what can go wrong with a training set, and why."""
