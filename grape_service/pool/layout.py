"""How the rows of a file are read: the layout that a sample of them shows, and how layouts of one group agree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

PROMPT_KEY, RESPONSE_KEY = "\0prompt", "\0response"
"""Under which a row has what was made of other columns of it."""
RESPONSE_COLUMN = "response_column"
"""The column that says which of several columns a response is from."""
DEALT_NAMES = (
    *("source", "candidate_id", "response_ids", "behavior_logprobs", "sampling", "finish_reason", "response_mask"),
    *("reasoning", "prefill"),
)
"""Our columns that belong to one candidate: beside a list of responses, a list of them is dealt."""

Reading = tuple[str | None, ...]
"""Where a row's prompt and responses are: (shape, prompt, response)."""


@dataclass(frozen=True)
class Layout:
    """How rows of a file are read."""

    shape: str
    """One of config.schema.Shape but auto."""
    theirs: dict[str, str]
    """Our column names to theirs, each of them."""
    columns: tuple[str, ...] = ()
    """Several columns with a response each."""
    column_sources: tuple[str, ...] = ()
    """For each of them the column that names its source, where there are such columns."""
    conversation: str | None = None
    """The column with messages that end with the response."""
    input: str | None = None
    """A column that continues the prompt, as in Alpaca's instruction, input and output."""
    dealt: tuple[str, ...] = ()
    """Lists with an element for each response."""
    json_text: tuple[str, ...] = ()
    """Columns with lists as JSON text."""
    is_sharegpt: bool = False
    missing: str | None = None
    """Our name of what no column of the sample holds: prompt or response."""
    guessed: dict[str, str] = field(default_factory=dict)
    """Of `theirs`, what the config does not say and has another name."""
    names: tuple[str, ...] = ()
    """Every column of the sample, and every field of its responses that are objects."""

    @property
    def reading(self) -> Reading | None:
        """Where its prompts and responses are; None where one of them is missing."""
        if self.missing is not None:
            return None
        if self.conversation is not None:
            return self.shape, self.conversation, self.conversation
        response = self.theirs["responses" if self.shape == "responses" else "response"]
        return self.shape, self.theirs["prompt"], response

    def reads(self, other: Layout) -> bool:
        """Whether rows of another layout have prompt and responses where this one looks for them."""
        if other.reading is None or self.reading is None or other.conversation != self.conversation:
            return False
        if self.conversation is not None:
            return True
        if other.theirs["prompt"] != self.theirs["prompt"]:
            return False
        if other.shape == "columns":
            return set(other.columns) <= set(self.columns)
        if other.shape == "responses":
            return self.shape == "responses" and other.theirs["responses"] == self.theirs["responses"]
        return self.shape in ("response", "responses") and other.theirs["response"] == self.theirs["response"]

    def joined(self, own: Layout) -> Layout:
        """This layout of a group's sample, with what a file of the group has by itself."""
        found = {
            ours: name
            for ours, name in own.theirs.items()
            if name in own.names and ours not in ("prompt", "response", "responses")
        }
        unseen = tuple(name for name in own.dealt if name not in self.names)
        return replace(
            self,
            theirs={**self.theirs, **found},
            guessed={ours: name for ours, name in self.guessed.items() if ours not in found}
            | {ours: name for ours, name in own.guessed.items() if ours in found},
            columns=tuple(dict.fromkeys((*self.columns, *own.columns))),
            column_sources=self.column_sources if len(self.columns) >= len(own.columns) else own.column_sources,
            input=self.input or own.input,
            dealt=(*self.dealt, *unseen),
            json_text=tuple(dict.fromkeys((*self.json_text, *own.json_text))),
            names=tuple(sorted({*self.names, *own.names})),
        )

    def difference(self, other: Layout) -> str | None:
        """In words, what `other` finds in the columns of its rows that this layout does not read; None for nothing."""
        for name in other.columns if self.columns else ():
            if name not in self.columns:
                return f"'{name}' holds a response, and is not among the columns with responses of its file"
        if not self.reads(other) and other.reading is not None:
            return f"it has {other.describe()}, and the rows of its file {self.describe()}"
        for ours, name in other.theirs.items():
            if self.theirs[ours] != name and not name.startswith("\0"):
                was = f"which its file has in '{self.theirs[ours]}'" if self.theirs[ours] in self.names else "which"
                was += "" if self.theirs[ours] in self.names else " no sampled row of its file has"
                return f"'{name}' holds its {ours}, {was}"
        if other.input != self.input and other.input is not None:
            return f"'{other.input}' continues its prompt, and is empty in the sampled rows of its file"
        return None

    def describe(self) -> str:
        """The shape in words, with the names of columns."""
        if self.missing is not None:
            return f"no {self.missing} found"
        if self.conversation is not None:
            what = f"messages that end with the response, in '{self.conversation}'"
            what += " (ShareGPT: from, value)" if self.is_sharegpt else ""
        else:
            prompt = f"'{self.theirs['prompt']}'" + (f" and '{self.input}'" if self.input else "")
            if self.theirs["prompt"] == PROMPT_KEY:
                prompt = "the conversations themselves"
            if self.columns:
                what = f"prompt in {prompt}, a response in each of {', '.join(self.columns)}"
            elif self.shape == "responses":
                what = f"prompt in {prompt}, a list of responses in '{self.theirs['responses']}'"
            else:
                what = f"prompt in {prompt}, response in '{self.theirs['response']}'"
        others = [
            f"{ours} in '{name}'"
            for ours, name in self.guessed.items()
            if ours not in ("prompt", "response", "responses")
        ]
        others += [f"dealt to the responses: {', '.join(self.dealt)}"] if self.dealt else []
        return "; ".join([what, *others])
