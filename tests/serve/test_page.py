"""The page at `/`: its files ask their own server alone, and a browser shows what the API answers."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import serve_cases
from serve_cases import client_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from fastattn.serve import page
from fastattn.serve.options import ServeOptions
from fastattn.serve.served import load_all
from fastattn.tasks import predict

KEY = "a key"
OPTIONS = ServeOptions(page_size=8, max_batch=4)
HEADS = {
    "fill": "ForMaskedLM",
    "tag": "ForTokenClassification",
    "classify": "ForSequenceClassification",
    "qa": "ForQuestionAnswering",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("served")
    serve_cases.save_gpt(root / "gpt")
    for name, head in HEADS.items():
        serve_cases.save_encoder(root / name, head, initializer_range=0.3)
    return [root / name for name in ("gpt", *HEADS)]


@pytest.fixture(scope="module")
def client(folders: list[Path]) -> Iterator[Any]:
    with client_of(load_all(folders, OPTIONS), OPTIONS) as made:
        yield made


@pytest.mark.parametrize("path", page.FILES)
def test_files_are_served_and_may_ask_their_own_server_alone(client: Any, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(page.FILES[path][1])
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"(?m)^\s*//.*$|\s// .*$", "", response.text))


def test_files_need_no_key_and_the_api_does(folders: list[Path]) -> None:
    options = ServeOptions(page_size=8, api_key=KEY)
    with client_of(load_all(folders[:1], options), options) as client:
        assert all(client.get(path).status_code == 200 for path in page.FILES)
        body = {"text": "the river"}
        assert client.post("/attention", json=body).status_code == 401
        found = client.post("/attention", json=body, headers={"Authorization": f"Bearer {KEY}"})
        assert found.status_code == 200


def test_attention_of_every_model(client: Any, folders: list[Path]) -> None:
    for folder in folders:
        name, config = folder.name, json.loads((folder / "config.json").read_text())
        found = client.post("/attention", json={"model": name, "text": "the old town"})
        assert found.status_code == 200, found.text
        layers, _, queries, keys = found.json()["shape"]
        assert (found.json()["model"], layers) == (name, config.get("num_hidden_layers") or config["n_layer"])
        assert queries == keys == len(found.json()["tokens"])
        assert client.get(f"/v1/models/{name}").json()["attention"]


def test_attention_while_requests_run_changes_none(client: Any) -> None:
    body = {"model": "gpt", "prompt": "the river", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    alone = client.post("/v1/completions", json=body)
    assert alone.status_code == 200, alone.text
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(client.post("/v1/completions", json=body).json()))
    thread.start()
    while thread.is_alive():
        assert client.post("/attention", json={"model": "gpt", "text": "a tower"}).status_code == 200
    thread.join()
    assert found[0]["choices"] == alone.json()["choices"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "gpt", "text": ""}, "text"),
        ({"model": "gpt", "text": "a", "text_pair": "b"}, "text_pair"),
        ({"model": "gpt"}, "text"),
        ({"model": "gpt", "text": 5}, "text"),
        ({"model": "none", "text": "a"}, "model"),
    ],
)
def test_attention_refuses(client: Any, body: dict[str, Any], param: str) -> None:
    response = client.post("/attention", json=body)
    assert response.status_code in (400, 404)
    assert param in response.json()["error"]["message"]


def test_every_field_of_a_prediction_can_be_entered() -> None:
    fields = re.search(r"const FIELDS = \{.*?\n\};", page_text("/page.js"), re.DOTALL)
    assert fields is not None
    for task in predict.TASKS:
        (row,) = re.findall(rf"^  {task.NAME}: \[(.*)\],$", fields[0], re.MULTILINE)
        entered = re.findall(r'\["(\w+)", "[^"]+"(, true)?\]', row)
        assert [name for name, optional in entered if not optional] == list(task.FIELDS)
        assert [name for name, optional in entered if optional] == list(task.OPTIONAL)


def page_text(path: str) -> str:
    folder = Path(page.__file__).with_name("page_files")
    return (folder / page.FILES[path][0]).read_text(encoding="utf-8")


@pytest.mark.downloads
def test_in_a_browser(folders: list[Path]) -> None:
    """Needs playwright and Chromium; everything is done with the keyboard but the choice of a model."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with listening(folders) as url, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        asked: list[str] = []
        errors: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(url)
        tab.focus("#input-prompt")
        tab.keyboard.type("the river")
        for _ in range(2):  # the second while the first is answered
            tab.keyboard.press("Control+Enter")
        tab.wait_for_selector("#token-3")
        tab.wait_for_selector("#run:enabled")
        assert sum(each.endswith("/v1/completions") for each in asked) == 1
        tab.focus("#tokens")
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#tokens [aria-selected=true]").get_attribute("id") == "token-1"
        assert tab.locator("#alternatives tbody tr").count() >= 5
        tab.focus("#attend")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#map-0-0")
        tab.focus("#maps")
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#map-title").inner_text() == "Layer 1, head 1"
        assert tab.locator("#weights tbody tr").count() > 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        asked_pair: list[Any] = []
        tab.on(
            "request",
            lambda request: asked_pair.append(request.post_data_json) if request.post_data else None,
        )
        texts = {
            "text": "the [MASK] tower",
            "text_pair": "",
            "question": "who lives?",
            "context": "anna lives in paris",
        }
        for name in HEADS:
            tab.select_option("#model", name)
            for area in tab.locator("#inputs textarea").all():
                area.fill(texts[area.get_attribute("name") or ""])
            tab.focus("#run")
            tab.keyboard.press("Enter")
            tab.wait_for_selector("#results tbody tr")
            assert tab.locator("#message").is_hidden(), tab.locator("#message").inner_text()
        tab.select_option("#model", "classify")
        for name in ("text", "text_pair"):
            tab.fill(f"#input-{name}", f"the {name}")
        tab.focus("#run")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#results tbody tr")
        tab.focus("#attend")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#map-0-0")
        browser.close()
    pair = {"text": "the text", "text_pair": "the text_pair"}
    assert asked_pair[-2:] == [{"model": "classify", "data": [pair]}, {"model": "classify", **pair}]
    assert {"model": "classify", "data": [{"text": texts["text"]}]} in asked_pair
    assert not errors
    assert all(each.startswith((url, "data:")) for each in asked)


class listening:
    """The URL of a server on this machine, until the block ends."""

    def __init__(self, folders: list[Path]) -> None:
        import uvicorn

        from fastattn.serve.app import create_app

        options = replace(OPTIONS, allowed_hosts=())  # as on this machine without a key
        app = create_app(load_all(folders, options), options)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
        self.socket = config.bind_socket()
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        end = time.monotonic() + 30
        while not self.server.started and time.monotonic() < end:
            time.sleep(0.02)
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)
