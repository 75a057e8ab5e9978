from __future__ import annotations

import pytest

from grape_service.prepare import plan


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Small pools in several pieces."""
    monkeypatch.setattr(plan, "PIECE_BYTES", 1)
