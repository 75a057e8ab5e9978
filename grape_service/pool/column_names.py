"""Names that published pools give to their columns, by what they hold; the first that a pool has is taken."""

from __future__ import annotations

import re

from grape_service.config.pool import POOL_COLUMNS

PROMPTS = ("prompt", "instruction", "question", "problem", "query", "input", "user_prompt", "prompt_text")
BATCH_PROMPTS = ("messages", "input.messages", "request.messages", "body.messages", "request.body.messages")
EVAL_PROMPTS = ("arguments.gen_args_0.arg_0", "doc.question", "doc.prompt", "doc.problem")
"""Of lm-eval's samples."""
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue", "trajectory", "chat")
RESPONSE_LISTS = (
    *("responses", "generations", "completions", "outputs", "candidates", "samples", "generated_responses"),
    "resps",
)
OBJECT_LISTS = ("answers", "response.candidates")
"""Lists of responses where their elements are objects; of texts they are what a right answer may be."""
CHOICES = ("choices", "response.choices", "response.body.choices", "body.choices", "completion.choices")
RESPONSES = (
    *("response", "output", "completion", "generation", "generated_text", "generated_solution", "model_output"),
    *("model_response", "answer", "solution", "chosen"),
)
PAIRS = (
    ("chosen", "rejected"),
    *(
        (f"{stem}{sep}a", f"{stem}{sep}b")
        for stem in ("response", "answer", "output", "completion")
        for sep in ("_", "")
    ),
    ("conversation_a", "conversation_b"),
)
"""Columns with a response each, or with a whole conversation each."""
PAIR_SOURCES = {"a": ("model_a", "model_b"), "d": ("chosen_model", "rejected_model")}
SOURCES = ("source", "generator", "model", "model_name", "generation_model", "teacher_model")
ELEMENT_TEXTS = ("response", "output", "text", "completion", "generation", "generated_text", "content", "answer")
SYSTEMS = ("system_prompt", "system", "system_message")
INPUTS = ("input", "context")
"""Of Alpaca and Dolly: what an instruction is about."""
FINISHES = (
    *("finish_reason", "finish_reasons", "stop_reason", "stop_reasons", "finishReason", "finishReasons"),
    *("stopReason", "done_reason"),
)
MASKS = (
    *("response_mask", "completion_mask", "loss_mask", "response_masks", "completion_masks", "loss_masks"),
    *("assistant_mask", "assistant_masks", "action_mask"),
)
"""Of the response's tokens: 1 where the policy wrote them."""
KWARGS = ("chat_template_kwargs", "template_kwargs")
PREFILLS = ("prefill", "assistant_prefill", "response_prefix", "response_prefill")
SAMPLINGS = ("sampling", "sampling_params", "sampling_parameters", "sampling_args", "generation_kwargs")
ALIASES = {
    "finish_reason": FINISHES,
    "response_mask": MASKS,
    "sampling": SAMPLINGS,
    "chat_template_kwargs": KWARGS,
    "prefill": PREFILLS,
}
"""Other names of our columns, also in responses that are objects."""
NUMBERED = re.compile(
    r"(?P<stem>.*(?:response|solution|output|generation|completion|answer|candidate|sample)s?_?)[0-9]+", re.I
)
KNOWN = frozenset(
    [
        *(*PROMPTS, *CONVERSATIONS, *RESPONSE_LISTS, *OBJECT_LISTS, *RESPONSES, *SOURCES, *SYSTEMS, *INPUTS),
        *(*FINISHES, *MASKS, *KWARGS, *PREFILLS, *SAMPLINGS, *POOL_COLUMNS),
        *(name.split(".")[0] for name in (*BATCH_PROMPTS, *CHOICES, *EVAL_PROMPTS)),
        *(name for pair in (*PAIRS, *PAIR_SOURCES.values()) for name in pair),
    ]
)
"""Names of columns by which a row's reading is found, beside those that end in a number."""
