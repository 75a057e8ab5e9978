"""A model is scored only with the weights that its files hold: every one, no other, each of its size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.models.files import resolve_model
from grape_service.models.vocabulary import Vocabulary
from grape_service.models.weights import check_policy, check_values, check_weights, quantization_of, refuse_architecture
from tests import tiny_models

State = dict[str, torch.Tensor]
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_models.make_model(tmp_path_factory.mktemp("whole") / "model"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3,000 tensors, which transformers fuses into a few."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("experts") / "model"
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=120,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def changed(source: Path, target: Path, change: Callable[[State], State | None] | None = None, **config: Any) -> str:
    """A copy of a model with other weights or another config."""
    shutil.copytree(source, target)
    if change is not None:
        state = load_file(target / "model.safetensors")
        save_file(change(state) or state, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(target)


def look(folder: str, **settings: Any) -> Any:
    policy = PolicyConfig(model=folder, **settings)
    weights = check_weights(folder, policy)
    check_values(folder, policy)
    return weights


def without(*names: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in names:
            del state[name]

    return change


def renamed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: weight for name, weight in state.items()}


def test_a_whole_model_is_taken(whole: Path, experts: Path) -> None:
    assert look(str(whole)).embedding_rows == 520
    assert look(str(experts)).unchecked is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head.weight"), r"lack lm_head\.weight \(and tie_word_embeddings is not set"),
        (without(LAYER), "lack model.layers.1.mlp.up_proj.weight: a LlamaForCausalLM"),
        (without(LAYER, "model.norm.weight"), "and 1 more"),
        (lambda state: {**state, "score.weight": torch.ones(1, 32)}, "hold score.weight, which a LlamaForCausalLM"),
        (lambda state: {**state, "model.layers.2.mlp.up_proj.weight": state[LAYER].clone()}, "hold model.layers.2.mlp"),
        (lambda state: {**state, LAYER: state[LAYER].T.contiguous()}, "is 32 x 64 in its files and 64 x 32 by its"),
        (
            lambda state: {
                **{name: weight for name, weight in state.items() if name != "lm_head.weight"},
                "v_head.summary.weight": torch.ones(1, 32),
            },
            "lack lm_head.weight .* while v_head.summary.weight is left over",
        ),
        (
            lambda state: {**state, LAYER: state[LAYER] * float("nan")},
            "up_proj.weight holds values that are not finite",
        ),
        (lambda state: {**state, LAYER: (state[LAYER] * float("inf")).bfloat16()}, "values that are not finite"),
        (lambda state: {**state, LAYER: state[LAYER].to(torch.int8)}, "stored as I8, but its config.json has no"),
        (renamed("some_other."), "its files lack lm_head.weight"),
    ],
)
def test_what_is_not_the_model_is_refused_by_name(whole: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        look(changed(whole, tmp_path / "m", change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64, "head_dim": 8}, "by its config.json"),
        ({"vocab_size": 516}, "embed_tokens.weight is 520 x 32 in its files and 516 x 32|lm_head.weight is 520 x 32"),
        ({"num_hidden_layers": 3}, r"lack model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"hold model\.layers\.1"),
        ({"num_key_value_heads": 4}, "k_proj.weight is 16 x 32 in its files and 32 x 32"),
        (
            {"tie_word_embeddings": True},
            "ties lm_head.weight to model.embed_tokens.weight, but its files hold different",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(
    whole: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        look(changed(whole, tmp_path / "m", **config))


def test_a_tied_head_may_be_stored_or_not(whole: Path, tmp_path: Path) -> None:
    tied = changed(whole, tmp_path / "a", without("lm_head.weight"), tie_word_embeddings=True)
    assert look(tied).embedding_rows == 520

    def both(state: State) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    look(changed(whole, tmp_path / "b", both, tie_word_embeddings=True))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_forward_module.module."])
def test_prefixes_of_wrappers_are_taken_off(whole: Path, tmp_path: Path, prefix: str) -> None:
    found = look(changed(whole, tmp_path / "m", renamed(prefix)))
    assert found.renames[f"{prefix}lm_head.weight"] == "lm_head.weight"


def test_prefixes_are_left_where_not_every_name_then_fits(whole: Path, tmp_path: Path) -> None:
    def change(state: State) -> State:
        return renamed("_orig_mod.")({name: w for name, w in state.items() if name != "lm_head.weight"})

    with pytest.raises(UserError, match=r"lack"):
        look(changed(whole, tmp_path / "m", change))


def test_one_expert_of_many_is_named(experts: Path, tmp_path: Path) -> None:
    one = "model.layers.3.mlp.experts.17.{}_proj.weight"
    with pytest.raises(UserError, match=r"lack model\.layers\.3\.mlp\.experts\.17\.up_proj\.weight: a Qwen3Moe"):
        look(changed(experts, tmp_path / "a", without(one.format("up"))))
    gone = without(*(one.format(name) for name in ("up", "gate", "down")))
    with pytest.raises(UserError, match=r"experts\.17\.down_proj\.weight and 2 more"):
        look(changed(experts, tmp_path / "b", gone))


def test_parts_and_their_index_must_agree(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(whole, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"model-1.safetensors": dict(list(state.items())[:9]), "model-2.safetensors": dict(list(state.items())[9:])}
    index = {name: file for file, tensors in parts.items() for name in tensors}

    def write(weight_map: dict[str, str]) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    for file, tensors in parts.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    write(index)
    assert look(str(folder)).embedding_rows == 520
    save_file({"left": torch.ones(1)}, folder / "consolidated.safetensors")  # no part of the model
    assert look(str(folder)).embedding_rows == 520
    swapped = {**index, "lm_head.weight": "model-2.safetensors", LAYER: "model-1.safetensors"}
    write(swapped if swapped != index else {**index, "lm_head.weight": "model-1.safetensors"})
    with pytest.raises(UserError, match=r"its index has .* which does not hold it"):
        look(str(folder))
    write({name: file for name, file in index.items() if name != "lm_head.weight"})
    with pytest.raises(UserError, match=r"holds lm_head\.weight, which its index does not name"):
        look(str(folder))
    write(index)
    (folder / "model-2.safetensors").write_bytes((folder / "model-2.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model-2\.safetensors ends before its weight"):
        look(str(folder))
    (folder / "model-2.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"pointer of Git LFS"):
        look(str(folder))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"names the weight file model-2.safetensors, which is not there"):
        look(str(folder))


def test_a_single_file_beside_an_index_of_others_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "m")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"both model.safetensors and model.safetensors.index.json"):
        look(folder)


@pytest.mark.parametrize(
    "architecture", ["LlamaForSequenceClassification", "LlamaModel", "BertForMaskedLM", "Qwen2ForRewardModel"]
)
def test_a_head_that_is_no_language_models_is_refused(whole: Path, tmp_path: Path, architecture: str) -> None:
    folder = changed(whole, tmp_path / "m", architectures=[architecture])
    with pytest.raises(UserError, match=f"is a {architecture}, which has no language model's head"):
        resolve_model(PolicyConfig(model=folder))
    refuse_architecture({"architectures": ["Gemma3ForConditionalGeneration"]}, "g")


def test_pickles_are_read_only_where_the_config_asks(whole: Path, tmp_path: Path) -> None:
    folder = Path(changed(whole, tmp_path / "m"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle file, .* set allow_pickle: true"):
        resolve_model(PolicyConfig(model=str(folder)))
    resolve_model(PolicyConfig(model=str(folder), allow_pickle=True))
    assert look(str(folder), allow_pickle=True).embedding_rows == 520
    del state["lm_head.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        look(str(folder), allow_pickle=True)


def test_an_embedding_smaller_than_the_tokenizer_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = PolicyConfig(model=folder)

    def look_at_tokens() -> None:
        check_policy(policy, folder, None, tokenizer, Vocabulary(tokenizer), has_weights=True)

    tokenizer.add_tokens([f"<new{i}>" for i in range(5)])
    look_at_tokens()  # 515 + 5 = 520: each has its row
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.init_kwargs["image_token"] = "<image_soft_token>"
    look_at_tokens()
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(UserError, match=r"520 embeddings, but its tokenizer has ids up to 521 .*521, '<one more>'"):
        look_at_tokens()


def test_a_checkpoint_that_is_quantised_in_itself_makes_no_weights(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "m", quantization_config={"quant_method": "fp8"})
    files = resolve_model(PolicyConfig(model=folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = (PolicyConfig(model=folder), folder, files.quantization, tokenizer, Vocabulary(tokenizer))
    check_policy(*arguments, has_weights=False)
    with pytest.raises(UserError, match=r"quantised in itself .*says fp8"):
        check_policy(*arguments, has_weights=True)
    assert quantization_of({"text_config": {"quantization_config": {"quant_method": "gptq"}}}) == "gptq"
    lacking = changed(whole, tmp_path / "n", without(LAYER), quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=r"lack the weights of model\.layers\.1\.mlp\.up_proj"):
        look(lacking)
