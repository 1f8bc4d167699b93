"""A workshop as a service of JupyterHub: guests are the hub's users, known by the hub's own tokens."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote, urlsplit

from flexmagic.errors import ClusterError
from flexmagic.workshop.address import LOOPBACK
from flexmagic.workshop.guests import RefusedError

NEEDED = ("JUPYTERHUB_API_TOKEN", "JUPYTERHUB_API_URL", "JUPYTERHUB_SERVICE_URL")
"""What the hub tells a service that it starts."""


class Hub:
    """The hub that started this process as a service, asked by its own library whose a token is.

    ``url``: where users reach the service, if the hub knows its own address in public; never the service's
    own port. Raises :class:`ClusterError` if no hub did, or without that library.
    """

    def __init__(self) -> None:
        if missing := [name for name in NEEDED if not os.environ.get(name)]:
            raise ClusterError(
                f"--hub is for a service that JupyterHub starts: {missing[0]} is not set. "
                "See the README on workshops for the lines in jupyterhub_config.py."
            )
        try:
            from jupyterhub.services.auth import HubAuth
        except ImportError:
            raise ClusterError(
                "--hub needs JupyterHub's library. Type pip install 'flexmagic[hub]' in this environment."
            ) from None
        self._auth: Any = HubAuth()
        where = urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"])
        self.host, self.port = where.hostname or LOOPBACK[0], where.port or 0
        if self.host not in LOOPBACK:
            raise ClusterError(
                f"The service's url is at {self.host}, where others would hear users' tokens. Give it one at "
                f"{LOOPBACK[0]}: the hub's proxy reaches it there, and speaks TLS with everybody else."
            )
        self.prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "/").rstrip("/")
        self.url = os.environ.get("JUPYTERHUB_PUBLIC_URL", "").rstrip("/")

    def user(self, token: str) -> str:
        """The name of the user whose token it is, who may use this service; raises :class:`RefusedError`.

        Asks the hub, which may take a while.
        """
        try:
            found = self._auth.user_for_token(token)
        except Exception as error:  # noqa: BLE001 - the hub is away, or refuses this service
            raise RefusedError(f"JupyterHub could not be asked who you are: {error}") from None
        if found is None:
            raise RefusedError("JupyterHub does not know your token.")
        if not self._auth.check_scopes(self._auth.access_scopes, found):
            scopes = sorted(self._auth.access_scopes)  # any is enough; the widest is for all services
            wanted = next((scope for scope in scopes if "!" in scope), scopes[0])
            raise RefusedError(f"{found['name']}: your token of JupyterHub lacks {wanted}; ask its admin.")
        return quote(str(found["name"]), safe=" ")
