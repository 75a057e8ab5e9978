"""The Prefect server that a command is about to use."""

from __future__ import annotations

import httpx
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL

from grape_service.errors import UserError

TIMEOUT_SECONDS = 5.0
OPEN = (
    "{} takes orders from everybody who reaches it: they can read the secret blocks, and run any code as the worker's "
    "user; start the server with PREFECT_SERVER_API_AUTH_STRING, and workers and clients with PREFECT_API_AUTH_STRING, "
    "as deploy/README.md shows"
)


def refuse_other_server() -> None:
    """Raises UserError where what answers at PREFECT_API_URL is not a Prefect server, or does not take our password.

    One that does not answer, or wants an API key, is left to Prefect's own client, which tries again.
    """
    api = PREFECT_API_URL.value()
    if not api:
        return
    try:
        answer = _version(api, PREFECT_API_AUTH_STRING.value())
        is_other = answer.is_success and not isinstance(answer.json(), str)
    except (httpx.HTTPError, httpx.InvalidURL):
        return
    except ValueError:  # no JSON
        is_other = True
    if is_other:
        raise UserError(f"{api} is not a Prefect server: set PREFECT_API_URL to one, such as http://host:4200/api")
    if answer.status_code == 401 and not PREFECT_API_KEY.value():
        raise UserError(
            f"the Prefect server at {api} refuses us: set PREFECT_API_AUTH_STRING to its PREFECT_SERVER_API_AUTH_STRING"
        )


def is_open(api: str) -> bool:
    """Whether the Prefect server answers those who do not say who they are."""
    try:
        return _version(api, None).is_success
    except httpx.HTTPError:
        return False


def _version(api: str, auth_string: str | None) -> httpx.Response:
    user, _, password = (auth_string or "").partition(":")
    auth = httpx.BasicAuth(user, password) if auth_string else None
    return httpx.get(f"{api.rstrip('/')}/admin/version", auth=auth, timeout=TIMEOUT_SECONDS)
