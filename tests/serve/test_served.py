"""Models of folders as a server holds them: where they are loaded."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import serve_cases
import torch
from serve_cases import save_gpt

from fastattn.console import InputError
from fastattn.data import Tokenizer
from fastattn.serve import served
from fastattn.serve.options import ServeOptions

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

TASKS = Path("/proc/self/task")  # the threads of this process, Python's or not


def test_models_are_loaded_in_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(served, "name_of", lambda folder: folder.name)
    monkeypatch.setattr(served, "load_one", lambda *_: threading.current_thread())
    loaded = served.load_all([tmp_path / "a", tmp_path / "b"], ServeOptions())
    assert set(loaded) == {"a", "b"}
    assert len({*loaded.values(), threading.current_thread()}) == 2


@pytest.mark.skipif(not TASKS.exists(), reason="only Linux tells the threads of a process")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has no OpenMP")
def test_openmp_keeps_no_threads_of_the_loading() -> None:
    """Other threads of this process may end or begin meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def work() -> tuple[int, set[str]]:
            before = set(os.listdir(TASKS))
            torch.ones(2**22).exp_()
            return torch.get_num_threads(), set(os.listdir(TASKS)) - before

        inside, made = served.in_own_thread(work)
    finally:
        torch.set_num_threads(threads)
    assert inside == 3
    assert len(made) >= 2
    end = time.monotonic() + 30
    while len(made & set(os.listdir(TASKS))) > len(made) - 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(made & set(os.listdir(TASKS))) <= len(made) - 2


def test_a_folder_whose_settings_no_request_can_have_is_refused_at_the_start(tmp_path: Path) -> None:
    serve_cases.save_gpt(tmp_path / "gpt")
    settings = tmp_path / "gpt" / "generation_config.json"
    for wrong in (
        {"typical_p": 0.5},
        {"temperature": -1.0, "do_sample": True},
        {"eos_token_id": "a"},
    ):
        settings.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=next(iter(wrong))):
            served.load_all([tmp_path / "gpt"], ServeOptions())
    settings.write_text(json.dumps({"num_beams": 4, "length_penalty": 2.0, "stop_strings": ["x"]}))
    assert list(served.load_all([tmp_path / "gpt"], ServeOptions())) == ["gpt"]


@pytest.mark.parametrize("top_k", [0, -1])
def test_values_that_keep_all_tokens_beat_the_folders(tmp_path: Path, top_k: int) -> None:
    serve_cases.save_gpt(tmp_path / "gpt")
    models = served.load_all([tmp_path / "gpt"], ServeOptions())
    body = {"prompt": "the river", "seed": 1, "max_tokens": 8}
    neutral = {"top_k": top_k, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "repetition_penalty": 1.0}
    neutral |= {"no_repeat_ngram_size": 0, "min_tokens": 0}
    with serve_cases.client_of(models) as client:
        plain = client.post("/v1/completions", json=body).json()["choices"]
        models["gpt"].engine.model.generation_config = {
            "top_k": 1, "top_p": 0.01, "min_p": 1.0, "temperature": 5.0, "repetition_penalty": 3.0,
            "prompt_lookup_num_tokens": 3, "no_repeat_ngram_size": 1, "min_length": 30,
        }  # fmt: skip
        found = client.post("/v1/completions", json={**body, **neutral}).json()["choices"]
        assert client.post("/v1/completions", json=body).json()["choices"] != plain
        biased = client.post("/v1/completions", json={**body, "logit_bias": {"5": 1}})
    assert found == plain
    assert biased.status_code == 200, biased.text


def test_a_link_is_named_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "3f2a").mkdir()
    (tmp_path / "small").symlink_to(tmp_path / "3f2a", target_is_directory=True)
    assert served.name_of(tmp_path / "small") == "small"


def test_a_tokenizer_with_added_tokens_beyond_the_vocabulary_is_served(tmp_path: Path) -> None:
    model = save_gpt(tmp_path / "m")
    of = Tokenizer.from_pretrained(tmp_path / "m")
    of.core.add_special_tokens([f"<image {n}>" for n in range(model.config.vocab_size)])
    of.save_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match="tokenizer: has the added token '<image"):
        assert set(served.load_all([tmp_path / "m"], ServeOptions())) == {"m"}


@pytest.mark.parametrize("error", [InputError("no such folder"), KeyboardInterrupt()], ids=repr)
def test_what_loading_raises_arrives(error: BaseException) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        served.in_own_thread(work)
    assert caught.value is error
