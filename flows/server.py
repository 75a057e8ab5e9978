"""The Prefect server that a command is about to use."""

from __future__ import annotations

import httpx
from prefect.settings import PREFECT_API_URL

from grape_service.errors import UserError

TIMEOUT_SECONDS = 5.0


def refuse_other_server() -> None:
    """Raises UserError where what answers at PREFECT_API_URL is not a Prefect server.

    One that does not answer, or asks who we are, is left to Prefect's own client, which tries again.
    """
    api = PREFECT_API_URL.value()
    if not api:
        return
    try:
        answer = httpx.get(f"{api.rstrip('/')}/admin/version", timeout=TIMEOUT_SECONDS)
        is_other = answer.is_success and not isinstance(answer.json(), str)
    except (httpx.HTTPError, httpx.InvalidURL):
        return
    except ValueError:  # no JSON
        is_other = True
    if is_other:
        raise UserError(f"{api} is not a Prefect server: set PREFECT_API_URL to one, such as http://host:4200/api")
