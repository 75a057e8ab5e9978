"""What every part of the config is based on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

HIDDEN = "***"
"""What stands for a secret wherever a config is shown or kept."""


class Model(BaseModel):
    """Base of every part of the config: frozen, unknown keys refused, docstrings are descriptions.

    Errors do not repeat the input: it may be a secret in the wrong place.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )
