"""Rendering: prompts and responses to token ids and loss masks."""
