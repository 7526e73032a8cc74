"""A server of six small models, for the tests of the API."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import serve_cases
from serve_cases import client_of

from fastattn.serve.options import ServeOptions

NEEDED = ("fastapi", "prometheus_client")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("served")
    made = {name: root / name for name in ("gpt", "chat", "embed", "classify", "score", "tag")}
    serve_cases.save_gpt(made["gpt"])
    serve_cases.save_gpt(made["chat"], chat=True, seed=1)
    serve_cases.save_encoder(made["embed"], "Model")
    serve_cases.save_encoder(made["classify"], "ForSequenceClassification", num_labels=3)
    serve_cases.save_encoder(made["score"], "ForSequenceClassification", num_labels=1)
    serve_cases.save_encoder(made["tag"], "ForTokenClassification")
    return made


@pytest.fixture(scope="session")
def client(folders: dict[str, Path]) -> Iterator[Any]:
    if any(find_spec(name) is None for name in NEEDED):
        pytest.skip("needs the extra [serve]")
    from fastattn.serve.served import load_all

    options = ServeOptions(page_size=8, max_batch=8)
    with client_of(load_all(list(folders.values()), options), options) as made:
        yield made
