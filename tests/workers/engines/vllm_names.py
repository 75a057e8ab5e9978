"""How a vLLM version is checked without running it: its source has every name that the engine uses.

    python -m tests.workers.engines.vllm_names vllm-0.32.0-....whl      reads a wheel's Python files; imports none of it

The extra `vllm` in pyproject.toml allows the versions that were checked, CHECKED in workers/engines/vllm/available.py.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

IMPORTED = {
    "vllm": ("PoolingParams", "SamplingParams", "__version__"),
    "vllm.distributed": ("cleanup_dist_env_and_memory",),
    "vllm.engine.arg_utils": ("EngineArgs",),
    "vllm.inputs": ("tokens_input",),
    "vllm.lora.request": ("LoRARequest",),
    "vllm.model_executor.layers.pooler": ("Pooler",),
    "vllm.model_executor.models.registry": ("ModelRegistry",),
    "vllm.usage.usage_lib": ("UsageContext",),
    "vllm.v1.core.sched.scheduler": ("Scheduler",),
    "vllm.v1.engine.llm_engine": ("LLMEngine",),
}
"""Names by the module that the engine imports them from."""

MEMBERS = {
    "EngineArgs": (
        "model skip_tokenizer_init dtype quantization tensor_parallel_size distributed_executor_backend "
        "trust_remote_code max_num_batched_tokens max_num_seqs enable_chunked_prefill enforce_eager disable_log_stats "
        "block_size enable_prefix_caching scheduler_cls runner hf_overrides additional_config enable_lora "
        "max_lora_rank long_prefill_token_threshold"
    ),
    "PoolingParams": "task skip_reading_prefix_cache extra_kwargs",
    "SamplingParams": "max_tokens temperature prompt_logprobs detokenize flat_logprobs",
    "Pooler": "get_supported_tasks forward",
    "_ModelRegistry": "models register_model get_supported_archs",
    "UsageContext": "LLM_CLASS",
    "Scheduler": "kv_cache_manager max_num_scheduled_tokens num_sampled_tokens_per_step",
    "LLMEngine": "from_engine_args add_request step abort_request reset_prefix_cache model_config engine_core",
    "KVCacheManager": "get_computed_blocks coordinator",
    "KVCacheCoordinator": "find_longest_cache_hit",
    "PoolingMetadata": "prompt_lens pooling_params pooling_states get_pooling_cursor",
    "PoolingCursor": "num_scheduled_tokens_cpu seq_lens_cpu",
    "PoolingStates": "hidden_states_cache",
    "PoolingOutput": "data",
    "RequestOutput": "request_id finished num_cached_tokens prompt_logprobs",
    "PoolingRequestOutput": "request_id finished num_cached_tokens outputs",
    "FlatLogprobs": "start_indices logprobs",
    "ModelConfig": "runner_type max_model_len get_vocab_size",
    "InprocClient": "engine_core shutdown",
    "EngineCore": "scheduler",
}
"""Methods and attributes by class, wherever in vLLM the class is."""

PARAMETERS = {
    "LLMEngine.from_engine_args": ("engine_args", "usage_context"),
    "LLMEngine.add_request": ("request_id", "prompt", "params", "lora_request"),
    "LLMEngine.abort_request": ("request_ids",),
    "KVCacheManager.get_computed_blocks": ("request",),
    "KVCacheCoordinator.find_longest_cache_hit": ("block_hashes", "max_cache_hit_length"),
    "Pooler.forward": ("hidden_states", "pooling_metadata"),
    "_ModelRegistry.register_model": ("model_arch", "model_cls"),
}
"""Parameters, the first ones, that the engine passes or takes."""

Read = Callable[[str], "str | None"]
"""The text of a file of the package by its path, such as vllm/outputs.py; None where there is none."""


def missing_names(read: Read, paths: list[str]) -> list[str]:
    """What the engine uses and a vLLM does not have; empty for one that it can run with."""
    found = [f"{module}.{name}" for module, names in IMPORTED.items() for name in names if not _has(read, module, name)]
    classes = _classes(read, paths)
    for name, members in MEMBERS.items():
        if name not in classes:
            found.append(name)
            continue
        there = set(_members(name, classes))
        found += [f"{name}.{member}" for member in members.split() if member not in there]
    for method, wanted in PARAMETERS.items():
        name, _, function = method.partition(".")
        given = _parameters(name, function, classes)
        if given is not None and given[: len(wanted)] != list(wanted) and not set(wanted) <= set(given):
            found.append(f"{method}({', '.join(wanted)})")
    return found


def _has(read: Read, module: str, name: str) -> bool:
    """Whether a module names it, or imports everything of one that does."""
    path = module.replace(".", "/")
    package = read(f"{path}/__init__.py")
    text = package if package is not None else read(f"{path}.py")
    if text is None:
        return False
    if re.search(rf"\b{name}\b", text):
        return True
    here = module if package is not None else module.rpartition(".")[0]
    return any(
        _has(read, f"{here}{source}" if source.startswith(".") else source, name)
        for source in re.findall(r"^from (\.?[\w.]+) import \*", text, re.M)
    )


def _classes(read: Read, paths: list[str]) -> dict[str, list[ast.ClassDef]]:
    """Definitions by name of the classes in MEMBERS and of their bases, which may be anywhere."""
    found: dict[str, list[ast.ClassDef]] = {}
    pattern = re.compile(r"^class (\w+)", re.M)
    names = {path: set(pattern.findall(read(path) or "")) for path in paths}
    wanted, done = set(MEMBERS), set[str]()
    while wanted - done:
        now, done = wanted - done, done | wanted
        for path, defined in names.items():
            if defined & now:
                for node in ast.parse(read(path) or "").body:
                    if isinstance(node, ast.ClassDef) and node.name in now:
                        found.setdefault(node.name, []).append(node)
                        wanted |= {base.id for base in node.bases if isinstance(base, ast.Name)}
    return found


def _members(name: str, classes: dict[str, list[ast.ClassDef]]) -> Iterator[str]:
    for node in classes.get(name, ()):
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                yield part.name
            elif isinstance(part, ast.AnnAssign | ast.Assign):
                for target in part.targets if isinstance(part, ast.Assign) else [part.target]:
                    if isinstance(target, ast.Name):
                        yield target.id
                    elif isinstance(target, ast.Attribute):
                        yield target.attr
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name) and base.id != name:
                yield from _members(base.id, classes)


def _parameters(name: str, function: str, classes: dict[str, list[ast.ClassDef]]) -> list[str] | None:
    for node in classes.get(name, ()):
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == function:
                given = [one.arg for one in (*part.args.args, *part.args.kwonlyargs)]
                return given[1:] if given[:1] in (["self"], ["cls"]) else given
    return None


def of_folder(site_packages: Path) -> list[str]:
    """`missing_names` of an installed vLLM, which is not imported."""
    paths = [str(path.relative_to(site_packages)) for path in (site_packages / "vllm").rglob("*.py")]

    def read(path: str) -> str | None:
        file = site_packages / path
        return file.read_text(errors="replace") if file.is_file() else None

    return missing_names(read, paths)


def of_wheel(path: Path) -> list[str]:
    """`missing_names` of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")}

        def read(name: str) -> str | None:
            return wheel.read(name).decode(errors="replace") if name in names else None

        return missing_names(read, sorted(names))


if __name__ == "__main__":
    for given in sys.argv[1:]:
        lacking = of_wheel(Path(given))
        print(f"{Path(given).name}: {'has all' if not lacking else 'lacks ' + ', '.join(lacking)}")
