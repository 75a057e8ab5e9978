"""Model files and the ids of policies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.models.files import ModelFiles, cache_folder, policy_id, resolve_model
from grape_service.storage.storage import Storage


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))


def write_model(folder: Path, seed: int = 0, **config: Any) -> str:
    """A folder that looks like a model: a config and two weight files with 24 parameters."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(seed)
    for part, shape in (("model-00001-of-00002", (3, 4)), ("model-00002-of-00002", (12,))):
        save_file({part: random.random(shape, dtype=np.float32)}, str(folder / f"{part}.safetensors"))
    return str(folder)


def files_of(model: str, **settings: Any) -> ModelFiles:
    return resolve_model(PolicyConfig(model=model, **settings))


def id_of(model: str, temperature: float = 1.0, **settings: Any) -> str:
    policy = PolicyConfig(model=model, **settings)
    return policy_id(policy, resolve_model(policy), temperature)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "My Model_1.5")
    (tmp_path / "My Model_1.5" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    files = files_of(folder)
    assert files.folder == folder
    assert (files.name, files.revision, files.adapter_folder) == (folder, None, None)
    assert (files.num_parameters, files.architecture) == (24, "LlamaForCausalLM")
    assert files.has_chat_template
    assert id_of(folder).startswith("my-model-1-5-")
    assert len(id_of(folder)) == len("my-model-1-5-") + 12


def test_an_id_follows_contents_not_places(tmp_path: Path) -> None:
    one = id_of(write_model(tmp_path / "a" / "model"))
    assert one == id_of(write_model(tmp_path / "b" / "model"))
    assert one == id_of(write_model(tmp_path / "c" / "model", transformers_version="9.9"))
    assert one != id_of(write_model(tmp_path / "d" / "model", seed=1))
    assert one != id_of(write_model(tmp_path / "e" / "model", rope_theta=5.0))


def test_an_id_holds_what_scores_depend_on_and_nothing_else(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    ids = [
        id_of(model),
        id_of(model, dtype="float32"),
        id_of(model, quantization="fp8"),
        id_of(model, temperature=0.7),
        id_of(model, adapter=write_adapter(tmp_path / "adapter")),
        id_of(model, adapter=write_adapter(tmp_path / "other", rank=8)),
    ]
    assert len(set(ids)) == len(ids)
    assert id_of(model, temperature=1.0) == ids[0]
    assert id_of(model, system_prompt="Be brief.", engine="transformers", engine_args={"device": "cpu"}) == ids[0]


def write_adapter(folder: Path, rank: int = 4) -> str:
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    save_file({"lora_A": np.ones((rank, 4), dtype=np.float32)}, str(folder / "adapter_model.safetensors"))
    return str(folder)


def test_weights_are_read_once_and_again_when_they_change(tmp_path: Path) -> None:
    folder = Path(write_model(tmp_path / "model"))
    before = files_of(str(folder)).weights_digest
    remembered = sorted((cache_folder() / "digests").iterdir())
    assert len(remembered) == 2
    for path in remembered:  # what is remembered is what is used
        path.write_text("0" * 64)
    assert files_of(str(folder)).weights_digest != before
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(1, 1))
    assert files_of(str(folder)).weights_digest == before


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    expected = files_of(model)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "file"))
    assert files_of(model) == expected


def test_an_s3_folder_is_downloaded_once_for_each_state(tmp_path: Path, s3_url: str) -> None:
    local = write_model(tmp_path / "model")
    storage = Storage(f"{s3_url}/models/model")
    for path in Path(local).iterdir():
        storage.write(path.name, path.read_bytes())
    files = files_of(storage.root)
    assert Path(files.folder).parent == cache_folder() / "models"
    assert replace(files, folder=local, name=local) == files_of(local)
    assert id_of(storage.root) == id_of(local)

    marker = Path(files.folder) / "marker"
    marker.write_text("still the same download")
    assert files_of(storage.root).folder == files.folder
    assert marker.exists()

    storage.write("config.json", b'{"architectures": ["OtherForCausalLM"]}')
    changed = files_of(storage.root)
    assert changed.folder != files.folder
    assert changed.architecture == "OtherForCausalLM"
    assert not [path for path in (cache_folder() / "models").iterdir() if path.name.startswith(".tmp-")]


def test_a_hub_model_out_of_the_local_hub_cache(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--team--tiny"
    write_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import sys; from grape_service.config.policy import PolicyConfig\n"
        "from grape_service.models.files import policy_id, resolve_model\n"
        "for revision in (None, sys.argv[1]):\n"
        "    policy = PolicyConfig(model='team/tiny', revision=revision)\n"
        "    files = resolve_model(policy)\n"
        "    print(files.revision, files.folder, policy_id(policy, files))\n"
        "try:\n"
        "    resolve_model(PolicyConfig(model='team/other', revision='v2'))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code, commit], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    newest, pinned, missing = done.stdout.splitlines()
    assert newest == pinned
    assert newest.startswith(f"{commit} {repository / 'snapshots' / commit} tiny-")
    assert missing.startswith(
        "UserError model 'team/other' at revision 'v2' is neither a local folder nor in the local"
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "has no config.json"),
        (lambda folder: folder.write_text("weights"), "is a file: give the folder"),
        (lambda folder: (write_model(folder), (folder / "config.json").write_text("{")), "config.json is not JSON"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "has no weight files"),
        (lambda folder: (folder.mkdir(), (folder / "m.gguf").write_text("")), "holds GGUF files"),
    ],
)
def test_what_is_not_a_model_is_a_sentence(tmp_path: Path, make: Any, sentence: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(UserError, match=sentence) as raised:
        files_of(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(raised.value)


def test_what_is_not_an_adapter_is_a_sentence(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"adapter .* is not a LoRA folder"):
        files_of(model, adapter=model)
    with pytest.raises(UserError, match=r"adapter .*nowhere' does not exist"):
        files_of(model, adapter=str(tmp_path / "nowhere"))


def test_an_empty_s3_folder_is_a_sentence(s3_url: str) -> None:
    with pytest.raises(UserError, match="there is no file in that folder"):
        files_of(f"{s3_url}/nothing-here")


def test_without_a_home_the_cache_is_a_temporary_folder_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPE_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "grape"
    monkeypatch.setenv("HOME", "/nonexistent")
    folder = cache_folder()
    assert folder == cache_folder() == tmp_path / f"grape-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="set GRAPE_CACHE to a folder of your own"):
        cache_folder()
