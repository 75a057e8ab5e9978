from __future__ import annotations

import pytest

from grape_service.prepare import plan


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of the size of partitions, in small pools too."""
    monkeypatch.setattr(plan, "PIECE_BYTES", 1)
    monkeypatch.setattr(plan, "PIECES", 1)
