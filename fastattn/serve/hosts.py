"""Which hosts and origins a server answers. A key keeps others out; without one, every page in a browser on the same
machine could send requests to 127.0.0.1, and read the answers by a name of its own that it resolves to that address."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastattn.serve.errors import ApiError

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,252}")


class Hosts:
    """Refuses requests to other hosts than this machine's own names and those given, and from pages of other origins.

    Args:
        names: further names and addresses, without a port and brackets.
        open_paths: those that pages of other origins may GET.
    """

    def __init__(self, names: Collection[str], open_paths: Collection[str]) -> None:
        self.names = {"localhost", *(name.lower() for name in names if name)}
        self.open_paths = open_paths

    def refusal(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> ApiError | None:
        """The error of a request that is not answered, 403; None for the others."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host_name(host)
        if name not in self.names and not is_loopback(name):
            return ApiError(
                403,
                "Host: is none of this server's names, which are localhost and those of --allowed-host",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin")
        if origin is None or (method in ("GET", "HEAD") and path in self.open_paths):
            return None
        _, _, place = origin.decode("latin-1").lower().partition("://")
        if place == host:
            return None
        return ApiError(403, "Origin: the request comes from a page of another origin", code="foreign_origin")


def host_name(host: str) -> str:
    """The name or address in a Host header in lower case, without port and brackets; empty where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_host(name: str) -> bool:
    """Whether this is a name or an address without port and brackets, as the Host header spells it."""
    try:
        return bool(_NAME.fullmatch(name) or ip_address(name))
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    """Whether this is an address that only this machine reaches."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False
