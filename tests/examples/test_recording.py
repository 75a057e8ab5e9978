"""What docs/recording.md says of vLLM, against a vLLM server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import make_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

RECORD = Path(__file__).resolve().parents[2] / "examples" / "recording" / "record.py"
START_SECONDS = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), hidden_size=128)  # heads of 32, the least that vLLM has on CPU


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": ""}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32"]
    command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(address):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def test_what_is_recorded_is_what_the_model_says(server: str, model: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 2 plus 2?"}\n{"prompt": "Name a capital."}\n')
    command = [sys.executable, str(RECORD), "vllm", server, model, str(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    tokenizer, scorer = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    assert [row["prompt"] for row in rows] == ["What is 2 plus 2?", "Name a capital."]
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = row["response_ids"]
        assert len(ids) == len(row["behavior_logprobs"]) > 0
        with torch.no_grad():
            logits = scorer(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
        expected = [float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(ids)]
        np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=2e-3)
        assert row["finish_reason"] in ("stop", "length")
