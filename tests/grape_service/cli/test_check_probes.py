"""What `grape check` looks at outside the pool and the model: engines, addresses, what training needs."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import time
from typing import Any

import pytest

from grape_service.cli.check_commands import probes_of
from grape_service.config.schema import Config
from grape_service.errors import UserError
from tests.prepared_pools import make_config
from workers.cluster import jobs
from workers.engines.choose import refuse_missing_engines


def config(**keys: Any) -> Config:
    return make_config("pool.jsonl", **keys)


def test_an_engine_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="engine: vllm of m is not installed here"):
        refuse_missing_engines(config(target={"model": "m", "engine": "vllm"}))
    with pytest.raises(UserError, match="engine: vllm of b is not installed here"):
        refuse_missing_engines(config(behavior={"model": "b", "engine": "vllm"}))
    refuse_missing_engines(config(target={"model": "m", "engine": "transformers"}))
    refuse_missing_engines(config(target={"model": "m", "engine": "vllm"}, workers={"ray_address": "http://head:8265"}))


def test_settings_that_the_engine_lacks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def engines(**target: Any) -> tuple[str, str]:
        return probes_of(config(target={"model": "m", **target}))["engines"]()

    with pytest.raises(UserError, match="engine_args has no 'max_batch_token' for transformers: it takes max_batch_to"):
        engines(engine="transformers", engine_args={"max_batch_token": 1})
    with pytest.raises(UserError, match="tensor_parallel needs engine: vllm"):
        engines(tensor_parallel=2)
    refuse_missing_engines(config(target={"model": "m", "tensor_parallel": 2}))  # nodes of a cluster may have vLLM
    with pytest.raises(UserError, match="tensor_parallel needs engine: vllm"):
        refuse_missing_engines(config(target={"model": "m", "tensor_parallel": 2, "engine": "transformers"}))
    status, detail = engines(engine_args={"max_num_seqs": 1, "device": "cpu"})
    assert status == "warning"
    assert detail == "auto; only vLLM reads engine_args max_num_seqs, and it is not installed here"
    assert engines(engine_args={"device": "cpu"}) == ("ok", "auto")


def test_an_address_that_does_not_answer_is_an_error_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        probes = probes_of(config(workers={"ray_address": f"http://127.0.0.1:{port}"}))
        with pytest.raises(UserError, match="takes connections and has not answered"):  # and Ray's client would wait
            probes["workers.ray_address"]()
    with pytest.raises(UserError, match=r"^127\.0\.0\.1 does not answer: "):
        probes["workers.ray_address"]()
    webhook = f"http://user:secret@127.0.0.1:{port}/token"
    with pytest.raises(UserError, match=r"^127\.0\.0\.1 does not answer: "):
        probes_of(config(notify={"webhook": webhook}))["notify.webhook"]()


def test_a_head_that_takes_no_connection_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 0.5)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):  # until no more are let in, as at an address from which nothing comes back
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        began = time.monotonic()
        with (
            pytest.raises(UserError, match="it takes no connection within 0 seconds"),
            jobs.job_server(f"http://127.0.0.1:{server.getsockname()[1]}"),
        ):
            pass
    assert time.monotonic() - began < 10


def test_only_what_the_config_names_is_looked_at() -> None:
    assert list(probes_of(config())) == ["engines"]
    assert list(probes_of(config(train={"sft": {"trainer": "builtin"}}))) == ["engines", "train"]
