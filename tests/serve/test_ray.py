"""The Ray Serve deployment: what it needs no cluster for, and two replicas of which one is killed (needs Ray)."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray_cases
import serve_cases
import yaml
from pages import DOCS, blocks_of
from ray_cases import Answer, Cluster, descendants, free_port, requests, until
from serve_cases import client_of

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("starlette.testclient", exc_type=(ImportError, RuntimeError))

from fastattn.console import InputError
from fastattn.serve import ray_app
from fastattn.serve.app import create_app
from fastattn.serve.options import ServeOptions
from fastattn.serve.served import load_all

PAGE = blocks_of((DOCS / "scale-serving.md").read_text(encoding="utf-8"), "scale-serving.md")
LONG = 1500  # tokens of a request that runs while others wait
PLACES = 2  # requests that a replica takes
QUEUE = 24  # requests that wait


def test_a_missing_ray_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_ray(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(InputError, match=re.escape("pip install 'fastattn[ray]'")):
        ray_app.application(["models/gpt2"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"folders": ["a"], "max_bach": 4}, r"max_bach: is unknown, needs one of folders, replicas, .*max_batch"),
        ({"folders": ["a"], "max_batch": "many"}, r"max_batch: .*valid integer"),
        ({"folders": ["a"], "replicas": 1.5}, r"replicas: .*integer"),
        ({"folders": 3}, r"folders: .*list"),
    ],
)  # fmt: skip
def test_arguments_of_a_configuration_file_are_checked_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ray_app.build(args)


def test_a_replica_is_unwell_once_the_thread_of_a_model_has_ended(folders: dict[str, Path]) -> None:
    from starlette.testclient import TestClient

    replica = ray_app.Replica([folders["gpt"], folders["embed"]], ServeOptions(max_batch=2))
    with TestClient(replica.__serve_build_asgi_app__()) as client:
        replica.check_health()
        response = client.get("/v1/models", headers={"x-request-id": "one"})
        assert {model["id"] for model in response.json()["data"]} == {"gpt", "embed"}
        assert "x-request-id" not in response.headers  # Ray's proxy adds it
        replica.models["embed"].worker.stop()
        with pytest.raises(RuntimeError, match=r"^embed: the thread"):
            replica.check_health()


def test_a_replica_refuses_what_the_command_refuses(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no such folder"):
        ray_app.Replica([folders["gpt"] / "nothing"], ServeOptions())
    with pytest.raises(InputError, match="--dtype"):
        ray_app.Replica([folders["gpt"]], ServeOptions(dtype="float8"))


def test_the_key_is_asked_for_under_the_prefix_of_a_route(folders: dict[str, Path]) -> None:
    from starlette.testclient import TestClient

    options = ServeOptions(api_key="key")
    app = create_app(load_all([folders["embed"]], options), options)
    with TestClient(app, root_path="/models") as client:
        assert client.get("/models/health").status_code == 200
        assert client.get("/models/v1/models").status_code == 401
        answer = client.get("/models/v1/models", headers={"Authorization": "Bearer key"})
        assert answer.status_code == 200
        assert 'route="/v1/models",status="401"' in client.get("/models/metrics").text


def test_the_classes_that_the_page_lists_for_vllm_are_those_that_folders_name() -> None:
    """Decoders: all of them and no other. Of encoders vLLM has a part."""
    from fastattn import models

    def written(cls: Any) -> set[str]:
        return {name for row in cls.families if row.in_transformers for name in row.architectures[:1]}

    text = (DOCS / "scale-serving.md").read_text(encoding="utf-8")
    table = [row.split("|")[1:3] for row in text.splitlines() if row.startswith("| ") and "`/v1/" in row]
    listed = {endpoint.strip(): set(re.findall(r"`(\w+)`", names)) for names, endpoint in table}
    assert listed["`/v1/completions`"] == written(models.GPT)
    assert listed["`/v1/embeddings`"] < written(models.Bert)
    assert listed["`/v1/rerank`, `/classify`"] < written(models.BertForSequenceClassification)


def needs_ray() -> None:
    if find_spec("ray") is None or find_spec("openai") is None:
        pytest.skip("needs the extra [ray], and openai")


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: Ray's sockets lie in it
    serve_cases.save_gpt(made / "gpt2", n_positions=4096)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(root: Path) -> Iterator[Callable[[Answer], str]]:
    """The text that one process answers, to one request at a time."""
    options = ServeOptions(max_batch=PLACES)
    with client_of(load_all([root / "gpt2"], options), options) as client:

        def text(answer: Answer) -> str:
            body = {**answer.body, **answer.body["extra_body"], "stream": False}
            del body["extra_body"]
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

        yield text


@pytest.fixture(scope="module")
def cluster(root: Path) -> Iterator[Cluster]:
    """The configuration file of the page with other numbers, run as the page says, in a cluster of its own."""
    needs_ray()
    config = yaml.safe_load(next(block.code for block in PAGE if block.language == "yaml"))
    sizes = {"folders": [str(root / "gpt2")], "replicas": 2, "max_batch": PLACES, "max_queue": QUEUE}
    config["applications"][0]["args"] = {**config["applications"][0]["args"], **sizes, "cpus": 0.5}
    config["http_options"]["port"] = port = free_port()
    (root / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = ray_cases.environment(root)
    command = [str(Path(sys.executable).with_name("serve")), "run", "--address", "local", "serve.yaml"]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
    made = Cluster(process, root, port, environment)

    def ready() -> bool:
        assert process.poll() is None, (root / "log").read_text(errors="replace")
        try:
            return "ready" in made.get("/ready")
        except OSError:
            return False

    try:
        until(ready)
        yield made
    finally:
        started = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            for pid in started & descendants(process.pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.downloads
@pytest.mark.timeout(600)
def test_clients_that_go_away_free_their_places(cluster: Cluster) -> None:
    """The first of the cluster's tests: without them, the requests would hold every place for 4,000 tokens."""
    client = cluster.client(max_retries=0)
    streams = [client.completions.create(**a.body) for a in requests(2 * PLACES, 4000, stream=True)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    until(lambda: 'fastattn_running{model="gpt2"} 0.0' in cluster.get("/metrics"))
    made = re.search(
        r'^fastattn_generated_tokens_total\{model="gpt2"\} (\S+)$', cluster.get("/metrics"), re.M
    )
    assert made
    assert 0 < float(made[1]) < 4000


@pytest.mark.downloads
@pytest.mark.timeout(600)
def test_requests_that_wait_outlive_a_replica(cluster: Cluster, alone: Callable[[Answer], str]) -> None:
    import openai

    running = requests(2 * PLACES, LONG, stream=True)
    threads = cluster.start(running, max_retries=0)
    for answer in running:
        assert answer.begun.wait(120)
    waiting = requests(QUEUE + 6, 40)
    threads += cluster.start(waiting, max_retries=0)
    until(lambda: sum(answer.error is not None for answer in waiting) >= 6)
    refused = [answer for answer in waiting if answer.error is not None]
    before = cluster.replicas()
    assert len(before) == 2
    assert [answer for answer in waiting if answer.begun.is_set()] == []
    assert [answer for answer in running if answer.finish or answer.error] == []
    killed = before.pop()
    os.kill(killed, signal.SIGKILL)
    for thread in threads:
        thread.join(300)

    assert len(refused) == 6
    for answer in refused:
        assert isinstance(answer.error, openai.RateLimitError)
        assert answer.error.response.headers["retry-after"] == "1"
    lost = [answer for answer in running if answer.finish is None]
    assert len(lost) == PLACES
    for answer in lost:  # an error, not the end of a shorter answer
        assert isinstance(answer.error, openai.APIConnectionError)
        assert alone(answer).startswith(answer.text.rstrip("\ufffd"))
    for answer in [a for a in running if a not in lost] + [a for a in waiting if a not in refused]:
        assert (answer.error, answer.finish) == (None, "length")
        assert answer.text == alone(answer)

    until(lambda: len(cluster.replicas() - {killed}) == 2)
    again = requests(4 * PLACES, 100, stream=True)
    for thread in cluster.start(again, max_retries=0):
        thread.join(300)
    assert [answer.text for answer in again] == [alone(answer) for answer in again]


@pytest.mark.downloads
@pytest.mark.timeout(600)
def test_a_client_that_tries_again_loses_nothing(cluster: Cluster, alone: Callable[[Answer], str]) -> None:
    """OpenAI's client as it is, under a load that lasts beyond the death of a replica."""
    until(lambda: len(cluster.replicas()) == 2)
    answers = requests(80, 60, stream=False)
    left, client = iter(answers), cluster.client()
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                answer = next(left, None)
            if answer is None:
                return
            answer.ask(client)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: sum(answer.finish is not None for answer in answers) >= 12)
    os.kill(cluster.replicas().pop(), signal.SIGKILL)
    for thread in threads:
        thread.join(300)
    assert [answer.error for answer in answers if answer.error] == []
    assert [answer.text for answer in answers] == [alone(answer) for answer in answers]


@pytest.mark.downloads
@pytest.mark.timeout(600)
def test_an_application_that_is_deleted_finishes_what_runs(
    cluster: Cluster, alone: Callable[[Answer], str]
) -> None:
    """The last of the cluster's tests."""
    until(lambda: len(cluster.replicas()) == 2)
    running = requests(2 * PLACES, 400, stream=True)
    threads = cluster.start(running, max_retries=0)
    for answer in running:
        assert answer.begun.wait(120)
    script = "import ray; from ray import serve; ray.init('auto', namespace='serve'); serve.delete('models')"
    subprocess.run([sys.executable, "-c", script], env=cluster.environment, timeout=200, check=True)
    for thread in threads:
        thread.join(200)
    assert [answer.text for answer in running] == [alone(answer) for answer in running]
    assert {answer.finish for answer in running} == {"length"}
    until(lambda: not cluster.replicas())


CALLS = """
import json, urllib.error, urllib.request

def get(path, **headers):
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers.get_all("x-request-id")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), None

key = {"Authorization": "Bearer secret", "x-request-id": "one"}
print(json.dumps([get("/gpt2/v1/models"), get("/gpt2/v1/models", **key), get("/gpt2/health"), get("/-/healthz")]))
"""


@pytest.mark.downloads
@pytest.mark.timeout(600)
def test_the_python_of_the_page_serves_under_a_prefix(root: Path) -> None:
    needs_ray()
    (root / "models").mkdir()
    serve_cases.save_gpt(root / "models" / "gpt2")
    start = (
        "import ray; from ray import serve\n"
        f"port = {free_port()}\n"
        "ray.init('local', num_cpus=2, log_to_driver=False); serve.start(http_options={'port': port})\n"
    )
    block = next(block.code for block in PAGE if block.language == "python")
    command = [sys.executable, "-c", start + block + CALLS + "serve.shutdown()"]
    done = subprocess.run(
        command, cwd=root, env=ray_cases.environment(root), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith("[["))  # Ray prints, too
    refused, models, health, proxy = json.loads(found)
    assert refused[0] == 401
    assert (models[0], json.loads(models[1])["data"][0]["id"], models[2]) == (200, "gpt2", ["one"])
    assert (health[0], proxy[:2]) == (200, [200, "success"])
