"""Secrets of a config are hidden from Prefect and found again, without a server."""

from __future__ import annotations

import orjson
import pytest

from flows.secrets import VARIABLE, hidden, kept, restored, secrets_of
from grape_service.config.schema import Config
from grape_service.errors import UserError

pytestmark = pytest.mark.alone

WEBHOOK = "https://hooks.example/T0KEN"
CONFIG = Config.model_validate(
    {
        "name": "x",
        "pool": {"path": "https://user:pa55@host/pool.jsonl"},
        "target": {"model": "m"},
        "output": {"path": "out"},
        "notify": {"webhook": WEBHOOK},
        "train": {"sft": {"webhook": "https://trainer.example/T0KEN", "parameters": {"a.b_token": "T0KEN"}}},
    }
)


def test_what_is_hidden_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    shown = hidden(CONFIG)
    text = shown.model_dump_json()
    assert "T0KEN" not in text
    assert "pa55" not in text
    with pytest.raises(UserError, match="is hidden, and GRAPE_CONFIG_SECRETS does not hold it"):
        restored(shown)
    with kept(CONFIG):
        assert restored(shown) == CONFIG
        assert CONFIG.train is not None
        assert restored(hidden(CONFIG.train), "train") == CONFIG.train
    monkeypatch.setenv(VARIABLE, orjson.dumps(secrets_of(CONFIG)).decode())
    assert restored(shown) == CONFIG
    assert restored(CONFIG) == CONFIG
    monkeypatch.setenv(VARIABLE, "{{ prefect.blocks.secret.gone }}")
    with pytest.raises(UserError, match="does not hold the secrets of a config"):
        restored(shown)
