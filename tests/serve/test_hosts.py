"""A server without a key on this machine alone is of no use to pages in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_cases import client_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from fastattn.console import InputError
from fastattn.serve import page
from fastattn.serve.options import ServeOptions
from fastattn.serve.served import load_all
from fastattn.serve.server import check_options, with_hosts

BODY = {"model": "gpt", "prompt": "a", "max_tokens": 1}
OWN = (
    "localhost",
    "localhost:8000",
    "LOCALHOST",
    "127.0.0.1:8000",
    "127.0.0.2",
    "[::1]:8000",
    "models.example:80",
)
FOREIGN = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "10.0.0.1",
    "[",
    "",
)


@pytest.fixture(scope="module")
def guarded(folders: dict[str, Path]) -> Iterator[Any]:
    options = ServeOptions(page_size=8, allowed_hosts=("Models.example",))
    with client_of(load_all([folders["gpt"]], options), options) as made:
        yield made


def ask(client: Any, **headers: str) -> tuple[int, str | None]:
    answer = client.post("/v1/completions", json=BODY, headers=headers)
    return answer.status_code, answer.json().get("error", {}).get("code")


@pytest.mark.parametrize("host", OWN)
def test_own_names_and_the_own_origin_are_answered(guarded: Any, host: str) -> None:
    assert ask(guarded, host=host) == (200, None)
    assert ask(guarded, host=host, origin=f"http://{host}") == (200, None)
    assert guarded.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_hosts_are_refused_on_every_path(guarded: Any, host: str) -> None:
    assert ask(guarded, host=host) == (403, "host_not_allowed")
    for path in ("/v1/models", "/health", "/metrics", *page.FILES):
        assert guarded.get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "", "localhost"])
def test_pages_of_other_origins_may_only_see_whether_it_runs(guarded: Any, origin: str) -> None:
    headers = {"host": "localhost", "origin": origin}
    assert ask(guarded, **headers) == (403, "foreign_origin")
    assert guarded.get("/v1/models", headers=headers).status_code == 403
    assert guarded.get("/health", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/attention"])
def test_bodies_of_other_types_are_refused(client: Any, kind: str | None, path: str) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post(path, content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    answer = client.post(path, content=b"[]", headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert answer.status_code == 400


def test_hosts_are_checked_on_loopback_without_a_key_and_where_they_are_named() -> None:
    plain, keyed, named = ServeOptions(), ServeOptions(api_key="k"), ServeOptions(allowed_hosts=("a",))
    for address in ("127.0.0.1", "::1"):
        assert with_hosts(plain, "me", address).allowed_hosts == ("me",)
        assert with_hosts(keyed, "me", address).allowed_hosts is None
        assert with_hosts(named, "me", address).allowed_hosts == ("a",)
    for address in ("0.0.0.0", "10.1.2.3", "::"):
        assert with_hosts(plain, "me", address).allowed_hosts is None
        assert with_hosts(named, "me", address).allowed_hosts == ("a",)


@pytest.mark.parametrize("name", ["", "a:80", "http://a", "a/b", "[::1]", "a@b"])
def test_a_name_with_more_than_a_host_is_refused(folders: dict[str, Path], name: str) -> None:
    check_options([folders["gpt"]], ServeOptions(allowed_hosts=("models.example", "::1", "10.0.0.1")))
    with pytest.raises(InputError, match="--allowed-host"):
        check_options([folders["gpt"]], replace(ServeOptions(), allowed_hosts=(name,)))
