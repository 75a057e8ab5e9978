"""The renderer of a model folder, made once in a process: policies that share a folder share what is large."""

from __future__ import annotations

import socket
from functools import lru_cache
from threading import Lock
from typing import Any

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.errors import StageError
from grape_service.models.files import adapter_here
from grape_service.models.tokenizer import folder_stamp, load_tokenizer, position_limit, stop_token_ids
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from grape_service.storage.options import StorageOptions


def load_renderer(
    folder: str,
    policy: PolicyConfig,
    config: RenderConfig,
    own_template: bool = False,
    storage_options: StorageOptions | None = None,
) -> Renderer:
    """The renderer of a policy whose model is in a local folder. Raises UserError if there is no tokenizer.

    An adapter's own tokenizer and template go first. `own_template`: a model that has a chat template uses that one
    and not `config.chat_template`, which was written for another policy.
    """
    named = PolicyConfig(model=policy.model, trust_remote_code=policy.trust_remote_code)
    own_template = own_template and config.chat_template is not None
    adapter = adapter_here(policy, storage_options)
    stamp = folder_stamp(folder) + ("" if adapter is None else folder_stamp(adapter))
    parts = folder, adapter, stamp, named.model_dump_json(), config.model_dump_json(), own_template
    with _LOADING:
        return _load(*parts) if policy.system_prompt is None else _with_prompt(policy.system_prompt, *parts)


def load_same_renderer(
    digest: str,
    folder: str,
    policy: PolicyConfig,
    config: RenderConfig,
    own_template: bool = False,
    storage_options: StorageOptions | None = None,
) -> Renderer:
    """`load_renderer` on the machine of a task. Raises StageError where it is not the run's, which has this digest."""
    renderer = load_renderer(folder, policy, config, own_template, storage_options)
    if renderer.digest() != digest:
        raise StageError(
            f"the tokenizer or chat template of {policy.model} on {socket.gethostname()} is not that of the run: give "
            "every node the same model files"
        )
    return renderer


class PromptRenderer:
    """Renders prompts alone, for what is to be sampled."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer

    def render(self, candidates: list[Candidate]) -> list[Rendered | Rejection]:
        """See `Renderer.render_prompts`."""
        return self._renderer.render_prompts(candidates)


_LOADING = Lock()
"""One of the threads that want a renderer makes it."""


@lru_cache(maxsize=8)
def _load(
    folder: str, adapter: str | None, stamp: str, policy_json: str, config_json: str, own_template: bool
) -> Renderer:
    policy = PolicyConfig.model_validate_json(policy_json)
    config = RenderConfig.model_validate_json(config_json)
    tokenizer = load_tokenizer(folder, policy, adapter)
    if own_template and tokenizer.chat_template:
        config = config.model_copy(update={"chat_template": None})
    return Renderer(tokenizer, config, max_tokens=position_limit(folder), stop_ids=stop_token_ids(folder))


@lru_cache(maxsize=32)
def _with_prompt(system_prompt: str, *parts: Any) -> Renderer:
    return _load(*parts).with_system_prompt(system_prompt)
