"""The Prefect server that a command is about to use."""

from __future__ import annotations

import httpx
from prefect.settings import PREFECT_API_URL

from grape_service.errors import UserError

SECONDS = 5.0


def refuse_other_server() -> None:
    """Raises UserError where PREFECT_API_URL leads to something that answers, and is no Prefect server.

    One that does not answer, or asks who we are, is left to Prefect's own client, which tries again.
    """
    api = PREFECT_API_URL.value()
    if not api:
        return
    try:
        answer = httpx.get(f"{api.rstrip('/')}/admin/version", timeout=SECONDS)
        is_other = answer.is_success and not isinstance(answer.json(), str)
    except (httpx.HTTPError, httpx.InvalidURL):
        return
    except ValueError:  # no JSON
        is_other = True
    if is_other:
        raise UserError(f"what answers at {api} is no Prefect server: PREFECT_API_URL is such as http://host:4200/api")
