"""Rendering: prompts and responses to token ids and loss masks."""

from grape_service.render.compatibility import incompatible_ids
from grape_service.render.renderer import Renderer

__all__ = ["Renderer", "incompatible_ids"]
