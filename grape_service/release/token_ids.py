"""Token ids that a model does not have: refused before anything is computed from a release that holds one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from grape_service.display import short
from grape_service.errors import UserError
from grape_service.rows.ragged import list_offsets_and_values


def refuse_unknown_ids(rows: pa.RecordBatch, num_ids: int, model: str, where: str, first: int = 0) -> None:
    """Raises UserError for the first of some rows that holds an id outside of 0 .. `num_ids` - 1.

    `where` names the release or its file, of which `first` rows were looked at before these; with `prompt_id` among the
    columns, that is told too.
    """
    offsets, ids = list_offsets_and_values(rows.column("input_ids"))
    unknown = np.flatnonzero(ids.view(np.uint32) >= num_ids)  # a negative one is as large as can be
    if not len(unknown):
        return
    row = int(np.searchsorted(offsets, unknown[0], side="right")) - 1
    prompt = f" (prompt_id {short(str(rows['prompt_id'][row]))})" if "prompt_id" in rows.schema.names else ""
    raise UserError(
        f"row {first + row + 1:,} of {where}{prompt} holds the token id {ids[unknown[0]]}, and {model} has the ids 0 "
        f"to {num_ids - 1:,}: the release is damaged, or of a model with other tokens; give the model that it was made "
        "for, or make the release again"
    )
