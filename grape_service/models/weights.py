"""Whether a model's files hold the model that config.json describes: every weight, no other, each of its size.

Names and sizes come from the headers of the safetensors files, so that nothing is read but those; which weights
the model has is asked of transformers' own class for it, built without memory ("meta"), with all the renamings
and fusions that transformers does when it loads. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.models.digests import stamp_of
from grape_service.models.headers import TensorHeader, read_headers, same_values, value_problem
from grape_service.models.vocabulary import Vocabulary

LANGUAGE_MODEL = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
WRAPPERS = frozenset({"_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch.compile, DDP, Lightning and FSDP put around a module's own."""

MAX_SCANNED_BYTES = 2 * 2**30
"""`grape check` looks at the values of a model up to this size; engines look at all that they load."""

MULTIMODAL_TOKEN = re.compile(r"(image|audio|video|vision|boi|eoi)")
"""Special tokens of models with other inputs than text, which the text model alone has no embedding for."""


@dataclass(frozen=True)
class Weights:
    """What was seen of a model's weights."""

    renames: dict[str, str] = field(default_factory=dict)
    """A stored name to the one without wrappers; empty where the names fit as they are."""
    embedding_rows: int | None = None
    """Tokens that have an embedding; None where transformers has no such model."""
    unchecked: str | None = None
    """Why names and sizes could not be checked, where they could not."""


def unwrapped(name: str) -> str:
    """A weight's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def check_weights(folder: str, policy: PolicyConfig) -> Weights:
    """Raises UserError for weights that are missing, left over or of another size, and for a head of another task.

    A process looks once at files that stay as they are.
    """
    seen = _stamp(folder), policy.model, policy.trust_remote_code
    if seen not in _known:
        _known[seen] = _check_weights(folder, policy)
    return _known[seen]


_known: dict[tuple[Any, ...], Weights] = {}


def check_values(folder: str, policy: PolicyConfig) -> None:
    """Raises UserError where a model of up to MAX_SCANNED_BYTES holds values that are not finite.

    Takes neither torch nor transformers, unless weights are pickled. A process looks once at files that stay as they
    are.
    """
    seen = _stamp(folder), policy.model
    if seen in _finite:
        return
    headers = read_headers(Path(folder), policy)
    if sum(header.num_bytes for header in headers.values()) <= MAX_SCANNED_BYTES:
        for name, header in headers.items():
            if problem := value_problem(header):
                raise UserError(
                    f"model '{policy.model}': {name} holds {problem}: its training diverged or a file is damaged"
                )
    _finite.add(seen)


_finite: set[tuple[Any, ...]] = set()


def _stamp(folder: str) -> tuple[Any, ...]:
    """Changes where a file of the folder changes."""
    return folder, tuple(sorted((path.name, stamp_of(path)) for path in Path(folder).iterdir()))


def _check_weights(folder: str, policy: PolicyConfig) -> Weights:
    try:
        config = _model_config(folder, policy)
        model = _empty_model(config, policy)
    except (ValueError, OSError, KeyError, ImportError) as error:  # vLLM may have it
        read_headers(Path(folder), policy)  # refuses damaged files
        return Weights(unchecked=f"transformers has no such model ({_first_line(error)})")
    except Exception as error:  # whatever a model's class raises where its config is not sensible
        raise UserError(f"model '{policy.model}': its config.json makes no model: {_first_line(error)}") from error
    headers = read_headers(Path(folder), policy)
    if getattr(config, "quantization_config", None) is not None:
        _check_quantised(model, headers, policy)
        return Weights({}, _embedding_rows(model))
    _refuse_whole_numbers(headers, policy)
    names = {name: unwrapped(name) for name in headers}
    is_wrapped = any(name != own for name, own in names.items()) and len(set(names.values())) == len(names)
    fit = _fit(model, config, headers)
    renames: dict[str, str] = {}
    if is_wrapped and not fit.is_right:
        unpacked = {own: headers[name] for name, own in names.items()}
        without = _fit(model, config, unpacked)
        if without.is_right:
            fit, renames, headers = without, names, unpacked
    fit.refuse(policy, headers, type(model).__name__)
    for target, source in fit.tied.items():
        if target in headers and source in headers and not same_values(headers[target], headers[source]):
            raise UserError(
                f"model '{policy.model}': its config.json ties {target} to {source}, but its files hold different "
                "values for the two: set tie_word_embeddings to false there, or remove the one that is not meant"
            )
    return Weights(renames, _embedding_rows(model))


def check_policy(
    policy: PolicyConfig,
    folder: str,
    quantization: str | None,
    tokenizer: Any,
    vocabulary: Vocabulary,
    has_weights: bool,
    look: Callable[[], Weights] | None = None,
) -> Weights:
    """Everything that can be known of a policy's files before an engine starts, without their values.

    `quantization` is how the checkpoint is quantised in itself; `has_weights` whether importance weights are made
    from this policy's scores; `look` stands for check_weights where that runs elsewhere.
    Raises UserError where the policy must not score.
    """
    if has_weights and quantization is not None:
        raise UserError(
            f"weights are not made from quantised scores, and model '{policy.model}' is quantised in itself (the "
            f"quantization_config of its config.json says {quantization}): give the unquantised model, "
            "or set weights to null"
        )
    weights = look() if look is not None else check_weights(folder, policy)
    refuse_small_embedding(policy.model, weights.embedding_rows, vocabulary, tokenizer)
    return weights


def refuse_architecture(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError where the model of a config.json has no language model's head."""
    architecture = next(iter(config.get("architectures") or []), None)
    if architecture is not None and not LANGUAGE_MODEL.search(str(architecture)):
        raise UserError(
            f"model '{name}' is a {architecture}, which has no language model's head: "
            "give the causal language model itself (…ForCausalLM)"
        )


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """How the weights of a model are quantised in its own files, by its config.json; None where they are not."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), dict):
                return str(part[key].get("quant_method") or part[key].get("format") or "an unnamed method")
    return None


def refuse_small_embedding(model: str, rows: int | None, vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Raises UserError where the tokenizer has ids that the model has no embedding for.

    Placeholders of images and the like do not count: text models are published with the tokenizer of their larger
    siblings, and a row that holds such an id is rejected.
    """
    if rows is None or vocabulary.size <= rows:
        return
    named = {str(value) for key, value in tokenizer.init_kwargs.items() if key.endswith("_token")}
    extra = {id_: text for id_, text in vocabulary.added.items() if id_ >= rows}
    known = {id_ for id_, text in extra.items() if text in named and MULTIMODAL_TOKEN.search(text)}
    lacking = [id_ for id_ in range(rows, vocabulary.size) if id_ not in known and vocabulary.has(id_)]
    if lacking:
        token = vocabulary.text_of(lacking[0])
        raise UserError(
            f"model '{model}' has {rows:,} embeddings, but its tokenizer has ids up to {vocabulary.size - 1:,} (the "
            f"first without an embedding: {lacking[0]}, '{token}'): tokens were added without resizing the model; "
            "resize its embeddings, or give the tokenizer that belongs to it"
        )


# Names and sizes


@dataclass(frozen=True)
class _Fit:
    """What transformers says of the names and sizes of a state dict."""

    missing: list[str]
    left_over: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, in the files, by config.json
    unconverted: str | None
    tied: dict[str, str]

    @property
    def is_right(self) -> bool:
        return not (self.missing or self.left_over or self.mismatched or self.unconverted)

    def refuse(self, policy: PolicyConfig, headers: Mapping[str, TensorHeader], kind: str) -> None:
        """Raises UserError naming what does not fit."""
        if self.is_right:
            return
        holes = _holes(headers)
        missing = holes if holes and (self.unconverted or self.mismatched or len(self.missing) == 1) else self.missing
        if self.mismatched and not holes:
            name, here, wanted = self.mismatched[0]
            raise UserError(
                f"model '{policy.model}': {name} is {_size(here)} in its files and {_size(wanted)} by its config.json"
                f"{_and_more(self.mismatched)}: config.json is not that of these weights"
            )
        if missing:
            tied = " (and tie_word_embeddings is not set in its config.json)" if "lm_head.weight" in missing else ""
            beside = f", while {self.left_over[0]}{_and_more(self.left_over)} is left over" if self.left_over else ""
            raise UserError(
                f"model '{policy.model}': its files lack {missing[0]}{_and_more(missing)}{tied}{beside}: a {kind} "
                "without it would be scored with random weights; give the whole checkpoint"
            )
        if self.left_over:
            raise UserError(
                f"model '{policy.model}': its files hold {self.left_over[0]}{_and_more(self.left_over)}, which "
                f"a {kind} of its config.json has no place for: these are the weights of another model"
            )
        raise UserError(f"model '{policy.model}': its weights cannot be put together: {self.unconverted}")


def _fit(model: Any, config: Any, headers: Mapping[str, TensorHeader]) -> _Fit:
    """Load a state dict of the same names and sizes, without values, by transformers' own rules."""
    import torch

    state = {
        name: torch.empty(header.shape, dtype=getattr(torch, header.torch_dtype), device="meta")
        for name, header in headers.items()
    }
    unconverted = None
    info: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    with quiet_transformers():
        try:
            loaded, info = type(model).from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            tied = dict(getattr(loaded, "all_tied_weights_keys", None) or {})
        except RuntimeError as error:
            tied, unconverted = {}, _first_line(error)
    return _Fit(
        sorted(info["missing_keys"], key=_head_first),
        sorted(info["unexpected_keys"]),
        sorted((name, tuple(here), tuple(wanted)) for name, here, wanted in info["mismatched_keys"]),
        unconverted,
        tied,
    )


def _head_first(name: str) -> tuple[bool, str]:
    return not name.startswith("lm_head"), name


def _holes(names: Iterable[str]) -> list[str]:
    """Names that a regular numbering (layers, experts) makes one expect, beside those that are there."""
    families: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name))
        if numbers:
            families.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), set()).add(numbers)
    everything: dict[int, set[tuple[int, ...]]] = {}
    for found in families.values():
        everything.setdefault(len(next(iter(found))), set()).update(found)
    holes = []
    for pattern, found in families.items():
        # A family that most of its kind belong to: layers of two kinds alternate in some models.
        expected = everything[len(next(iter(found)))] | set(itertools.product(*map(set, zip(*found, strict=True))))
        if len(expected) - len(found) <= len(expected) // 4:
            holes += [pattern.format(*numbers) for numbers in expected - found]
    return sorted(holes)


def _check_quantised(model: Any, headers: Mapping[str, TensorHeader], policy: PolicyConfig) -> None:
    """A quantised checkpoint has other tensors in the places of the weights: every module must have some."""
    wanted = {name.rsplit(".", 1)[0] for name in model.state_dict()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    optional = {name.rsplit(".", 1)[0] for name in tied}
    found = {module for name in headers for module in _modules(name)}
    missing = sorted(module for module in wanted - optional if module not in found)
    experts = [module for module in missing if "expert" in module]
    missing = [module for module in missing if module not in experts]
    if missing:
        raise UserError(
            f"model '{policy.model}': its files lack the weights of {missing[0]}{_and_more(missing)}: "
            "give the whole checkpoint"
        )


def _modules(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, with and without the prefix of the base model."""
    parts = unwrapped(name).split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        yield module
        yield f"model.{module}"


def _refuse_whole_numbers(headers: Mapping[str, TensorHeader], policy: PolicyConfig) -> None:
    """Weights that are stored in 8 bits or fewer need scales, and a quantization_config that says how."""
    for name, header in headers.items():
        if header.dtype not in ("F64", "F32", "F16", "BF16") and name.endswith((".weight", ".qweight")):
            raise UserError(
                f"model '{policy.model}': {name} is stored as {header.dtype}, but its config.json has no "
                "quantization_config that says how to read it"
            )


# Transformers


def _model_config(folder: str, policy: PolicyConfig) -> Any:
    from transformers import AutoConfig

    with quiet_transformers():
        return AutoConfig.from_pretrained(folder, trust_remote_code=policy.trust_remote_code, local_files_only=True)


def _empty_model(config: Any, policy: PolicyConfig) -> Any:
    """The model that a config describes, without values or memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=policy.trust_remote_code)


def _embedding_rows(model: Any) -> int | None:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError):  # what transformers raises for a model that has none
        return None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars and reports: what they say is told in one sentence."""
    from transformers.utils import logging

    had_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(number) for number in shape) or "one number"


def _and_more(names: list[Any]) -> str:
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""
