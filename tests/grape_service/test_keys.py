"""Keys leave out by name: every field of the config and every file of a model's folder is part of each key, or in that
key's list of what has no effect."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from grape_service import keys
from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.models.files import policy_id, resolve_model, text_digests
from tests.grape_service.models.test_files import write_adapter, write_model

pytestmark = pytest.mark.quick

Change = tuple[str, Any]
"""Path of a field, and the whole in which that field alone has another value."""


def example(annotation: Any) -> Any:
    """A value of a type with all that can be in it: nothing is validated, so that it holds what excludes each other."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return example(inner[0])
    if origin in (Union, types.UnionType):
        models = [one for one in inner if _is_model(one) or get_origin(one) in (list, dict, Annotated)]
        return example(next(iter(models), next(one for one in inner if one is not type(None))))
    if origin is Literal:
        return inner[0]
    if origin is list:
        return [example(inner[0])]
    if origin is dict:
        several = get_args(inner[1]) if get_origin(inner[1]) in (Union, types.UnionType) else (inner[1],)
        return {f"entry-{place}": example(one) for place, one in enumerate(several)}
    if origin is tuple:
        return tuple(example(one) for one in inner if one is not ...)
    if _is_model(annotation):
        return annotation.model_construct(
            **{name: example(field.annotation) for name, field in annotation.model_fields.items()}
        )
    values = {str: "text", int: 3, float: 0.5, bool: False, Any: "anything"}
    assert annotation in values, f"say here what is an example of {annotation}, and in `other` of another one"
    return values[annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    assert isinstance(value, str), value
    return f"{value} of another kind"


def changes(value: Any, path: tuple[str, ...] = ()) -> Iterator[Change]:
    """`value` with one field after the other changed, at every depth; a list or dictionary that is longer too."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            for where, changed in changes(getattr(value, name), (*path, name)):
                yield where, value.model_copy(update={name: changed})
    elif isinstance(value, dict):
        yield ".".join(path), {**value, "one more": "entry"}
        for name, one in value.items():
            for where, changed in changes(one, (*path, "*")):
                yield where, {**value, name: changed}
    elif isinstance(value, list | tuple):
        yield ".".join(path), [*value, "one more"]
        for place, one in enumerate(value):
            for where, changed in changes(one, (*path, "*")):
                yield where, [*value[:place], changed, *value[place + 1 :]]
    else:
        yield ".".join(path), other(value)


def left_out(path: str, without: keys.WithoutEffect) -> bool:
    """Whether a key's list names a field, or a section that it is in."""
    return any(path == one or path.startswith(f"{one}.") for one in without)


CONFIG: Config = example(Config)
FILES = {"weights": "w", "config": "c", "adapter": None, "others": None}


def prepared(config: Any = CONFIG, **given: Any) -> str:
    made_of = {"files": ["a"], "groups": CONFIG.pool.groups, "rendering": "r", "cut": [1, 1, 2], **given}
    return keys.prepared_key(config, **made_of)


def scores(policy: Any = CONFIG.target, files: dict[str, Any] = FILES, temperature: float = 1.0) -> str:
    return keys.scores_key(policy, files, temperature)


def release(config: Any = CONFIG, **given: Any) -> str:
    return keys.release_key(config, {"files": "f", **given})


@pytest.mark.parametrize(
    ("key", "without", "whole"),
    [
        (prepared, keys.PREPARED_WITHOUT, CONFIG),
        (scores, keys.SCORES_WITHOUT, CONFIG.target),
        (release, keys.RELEASE_WITHOUT, CONFIG),
        (keys.rounds_key, keys.ROUNDS_WITHOUT, CONFIG),
    ],
)
def test_every_field_of_the_config_is_in_a_key_or_in_its_list(
    key: Callable[[Any], str], without: keys.WithoutEffect, whole: Any
) -> None:
    known, paths = key(whole), []
    for path, changed in changes(whole):
        paths.append(path)
        assert (key(changed) == known) == left_out(path, without), (
            f"'{path}' changes and the key does not: put it into the key, or into its list with the reason"
            if not left_out(path, without)
            else f"'{path}' is said to have no effect, and changes the key"
        )
    assert len(paths) > 10
    free = ("engine_args.",)  # keys of these are the engine's own
    stale = [
        one for one in without if not one.startswith(free) and not any(left_out(path, {one: ""}) for path in paths)
    ]
    assert stale == [], "these fields are no more"
    assert all(without.values()), "each has its reason"


def test_a_field_that_is_added_is_in_every_key_until_someone_decides() -> None:
    class Later(Config):
        seed_of_next_year: int = 1

    config = Later.model_construct(**{name: getattr(CONFIG, name) for name in Config.model_fields})
    changed = config.model_copy(update={"seed_of_next_year": 2})
    assert prepared(config) != prepared(changed)
    assert release(config) != release(changed)

    class LaterPolicy(PolicyConfig):
        rope: str = "none"

    policies = [LaterPolicy(model="m", rope=rope) for rope in ("none", "yarn")]
    assert len({scores(policy) for policy in policies}) == 2


def test_settings_of_an_engine_are_left_out_one_by_one() -> None:
    def of(**args: Any) -> str:
        return scores(PolicyConfig(model="m", engine_args=args))

    assert of() == of(max_num_seqs=4, device="cpu")
    assert len({of(), of(kv_cache_dtype="fp8"), of(hf_overrides={"rope_theta": 1}), of(what_comes_next_year=1)}) == 4


def test_the_rest_of_what_a_key_is_made_of() -> None:
    groups = [group.model_copy(update={"source": "other"}) for group in CONFIG.pool.groups]
    parts = [{"files": ["b"]}, {"groups": groups}, {"rendering": "s"}, {"cut": [1, 1, 3]}]
    assert len({prepared(), *(prepared(**part) for part in parts)}) == 5
    assert release() != release(files="g")
    assert len({scores(), *(scores(files={**FILES, name: "x"}) for name in FILES), scores(temperature=0.7)}) == 6
    assert keys.complete_key("p", ["rank"]) != keys.complete_key("p", [])
    assert keys.complete_key("p", []) != keys.complete_key("q", [])
    assert (
        len({keys.adapter_key("w", "c", None), keys.adapter_key("w", "d", None), keys.adapter_key("w", "c", "o")}) == 3
    )


@pytest.fixture
def fresh() -> Iterator[None]:
    """What a process knows of its code and its libraries is looked up again, before and after."""
    found = (keys.text_libraries, keys.environment, keys._code)
    for one in found:
        one.cache_clear()
    yield
    for one in found:
        one.cache_clear()


def test_code_and_libraries_are_in_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    for name in ("grape_service/keys.py", "grape_service/render/renderer.py", "grape_service/select/grape.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(keys, "__file__", str(tmp_path / "grape_service/keys.py"))

    def change(name: str) -> tuple[bool, bool]:
        before = prepared(), release()
        (tmp_path / name).write_text("2")
        keys._code.cache_clear()
        return prepared() != before[0], release() != before[1]

    assert change("grape_service/render/renderer.py") == (True, True)
    assert change("grape_service/select/grape.py") == (False, True), "choosing comes after rows are prepared"
    assert change("grape_service/new.py") == (True, True)
    before = prepared(), release()
    (tmp_path / "site" / "something-1.2.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    keys.environment.cache_clear()
    assert (prepared() == before[0], release() == before[1]) == (True, False)
    versions = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0" if name == "tokenizers" else versions(name), raising=True
    )
    keys.text_libraries.cache_clear()
    assert prepared() != before[0]
    assert {"transformers", "tokenizers", "jinja2"} <= set(keys.text_libraries())
    before = prepared(), release()
    monkeypatch.setattr(sys, "version", "4.0")
    keys.environment.cache_clear()
    assert release() != before[1]


INDEX = json.dumps({"weight_map": {f"model-0000{n}-of-00002": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}})
MODEL_FILES = (
    *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "modeling_own.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "spiece.model", "qwen.tiktoken", "tokenization_own.py", "chat_template.jinja"),
    *("additional_chat_templates/tool_use.jinja", "generation_config.json", "preprocessor_config.json"),
    *("optimizer_own.py", "vocab.py", "tokenizer_own.py", "LICENSE_check.py", "training_args.py", "rng_state.py"),
    *("what_comes_next_year.json", "folder/of/next/year.bin.json"),
    *("README.md", ".gitattributes", ".git/config", "checkpoint-10/config.json", "optimizer.pt", "model.gguf"),
)


@pytest.mark.parametrize("which", ["model", "adapter"])
def test_every_file_of_a_model_folder_is_in_a_key_or_in_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))
    folders = {"model": Path(write_model(tmp_path / "model")), "adapter": Path(write_adapter(tmp_path / "adapter"))}
    folder = folders[which]
    names = [name for name in MODEL_FILES if which == "model" or name not in ("config.json", MODEL_FILES[1])]
    names += ["adapter_config.json", "adapter_model.safetensors"] if which == "adapter" else []
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text(INDEX if name.endswith(".index.json") else f"{name}: 1")
    policy = PolicyConfig(model=str(folders["model"]), adapter=str(folders["adapter"]))

    def found() -> tuple[str, Any]:
        return policy_id(policy, resolve_model(policy)), text_digests(str(folder))

    for name in names:
        before = found()
        if name in ("config.json", "adapter_config.json") or name.endswith(".index.json"):
            value = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**value, "what_comes_next_year": 1}))
        else:
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        after = found()
        unread = any(fnmatchcase(name, pattern) for pattern in keys.NOT_READ)
        assert (after != before) == (not unread), f"{name}: neither in a key nor in the list of what nothing reads"
        of_scores = not any(fnmatchcase(name, pattern) for pattern in keys.SCORES_WITHOUT_FILES)
        of_scores |= name in ("config.json", "adapter_config.json") or name.endswith(".safetensors")
        assert (after[0] != before[0]) == of_scores, name
        of_texts = not any(fnmatchcase(name, pattern) for pattern in keys.TEXTS_WITHOUT_FILES)
        assert (after[1] != before[1]) == of_texts, name
        assert not name.endswith(".py") or (of_scores and of_texts), "code may decide anything"
    lists = (keys.NOT_READ, keys.SCORES_WITHOUT_FILES, keys.TEXTS_WITHOUT_FILES, keys.CONFIG_JSON_WITHOUT)
    assert all(reason for one in lists for reason in one.values())


def test_a_config_json_says_all_but_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))
    ids = {}
    for key in ("", "rope_theta", "eos_token_id", "of_next_year", *keys.CONFIG_JSON_WITHOUT):
        policy = PolicyConfig(model=write_model(tmp_path / "model", **({key: "x"} if key else {})))
        ids[key] = policy_id(policy, resolve_model(policy))
    assert {key for key in ids if ids[key] == ids[""]} == {"", *keys.CONFIG_JSON_WITHOUT}


def test_scores_of_an_earlier_version_are_found_again() -> None:
    """Names that a workspace holds: whoever changes them has every row of every pool scored again."""
    files = {"weights": "w", "config": "c", "adapter": None, "others": None}
    assert keys.scores_key(PolicyConfig(model="m"), files, 1.0) == "355643218e34"
    assert keys.scores_key(PolicyConfig(model="m", dtype="float32"), files, 0.7) == "6d0d2ec31425"


def test_a_folder_that_leads_into_itself_is_read_once(tmp_path: Path) -> None:
    folder = Path(write_model(tmp_path / "model"))
    (folder / "loop").symlink_to(folder)
    (folder / "gone").symlink_to(folder / "nowhere")
    shutil.copytree(folder, tmp_path / "templates", symlinks=True)
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    assert not any("loop" in name or "gone" in name for name in text_digests(str(folder)))
    (tmp_path / "templates" / "x.jinja").write_text("{{ 1 }}")
    assert "additional_chat_templates/x.jinja" in text_digests(str(folder))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"quantization": "fp8"}, "quantization"),
        ({"engine_args": {"quantization": "awq"}}, "engine_args.quantization"),
        ({"engine_args": {"kv_cache_dtype": "fp8_e4m3"}}, "engine_args.kv_cache_dtype"),
        ({"engine_args": {"load_format": "bitsandbytes"}}, "engine_args.load_format"),
        (
            {"engine_args": {"hf_overrides": {"quantization_config": {"quant_method": "fp8"}}}},
            "engine_args.hf_overrides",
        ),
        ({"engine_args": {"hf_overrides": {"text_config": {"expert_dtype": "mxfp4"}}}}, "engine_args.hf_overrides"),
        ({"engine_args": {"kv_cache_dtype": "auto", "hf_overrides": {"rope_theta": 1}, "max_model_len": 8}}, None),
        ({"engine_args": {"quantization": None, "load_format": "safetensors"}}, None),
    ],
)
def test_what_an_engine_quantises_makes_no_weights(settings: dict[str, Any], key: str | None) -> None:
    assert PolicyConfig(model="m", **settings).quantised_by == key
    for section in ("target", "behavior"):
        config = {
            **{"name": "x", "pool": {"path": "p"}, "output": {"path": "o"}, "weights": {"method": "pear"}},
            **{"target": {"model": "m"}, "behavior": {"model": "n"}},
            section: {"model": "m", **settings},
        }
        if key is None:
            Config.model_validate(config)
        else:
            with pytest.raises(ValueError, match=re.escape(f"not made from quantised scores: remove '{key}' from m")):
                Config.model_validate(config)
