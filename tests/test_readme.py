"""The READMEs keep their word: examples run, commands and links exist, the feature table is what backends answer."""

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastattn import backends, cli
from fastattn.spec import AttentionCall, AttentionSpec

ROOT = Path(__file__).resolve().parent.parent
YES, NO = "\N{HEAVY CHECK MARK}", "\N{EN DASH}"
READMES = ("README.md", "README.zh-CN.md")
OPTIONS_OF_SPEC = {  # an option as the table names it -> the field of a spec that it sets
    "causal=": {"causal": "bottom_right"},
    "window=": {"window_left": True},
    "key_lengths=": {"key_lengths": True},
    "segment_ids=": {"segments": True},
    "mask=": {"mask": True},
    "bias=": {"bias": True},
    "alibi_slopes=": {"alibi": True},
    "softcap=": {"softcap": True},
    "sinks=": {"sinks": True},
    "dropout_p=": {"dropout": True},
}


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def examples(name: str) -> list[tuple[str, str]]:
    """Every Python example with the output that follows it, "" where none is shown."""
    text = (ROOT / name).read_text(encoding="utf-8")
    pattern = r"^```python\n(.*?)^```$(?:(?:(?!^```|^#).)*?^```text\n(.*?)^```$)?"
    return re.findall(pattern, text, re.MULTILINE | re.DOTALL)


EXAMPLES = list(dict.fromkeys(example for name in READMES for example in examples(name)))
# what the shown outputs are from
AS_SHOWN = not torch.cuda.is_available() and find_spec("triton") is not None


@pytest.mark.parametrize(("example", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_runs_and_prints_what_is_shown(example: str, output: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if output and AS_SHOWN:
        assert done.stdout == output


@pytest.mark.parametrize(("language", "count"), [("python", 3), ("bash", 3), ("text", 2)])
def test_both_readmes_show_the_same_code(language: str, count: int) -> None:
    first, second = (blocks(name, language) for name in READMES)
    assert len(first) == count
    assert first == second


@pytest.mark.parametrize("name", READMES)
def test_the_cycles_it_names_are_those_of_the_page_on_hopper(name: str) -> None:
    """The forward at head dim 128, ours and theirs, and the backward at 64 in one pass."""
    page = (ROOT / "docs" / "hopper.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line.strip("| ")) for line in page.splitlines() if line.startswith("| ")]
    peers = {row[0]: row for row in rows if len(row) >= 5}
    forward, backward = peers["128, forward"], peers["64, all in one pass"]
    named = {figure.split()[0] for row in (forward, backward) for figure in (row[2], row[4])}
    text = (ROOT / name).read_text(encoding="utf-8")
    assert all(f" {figure}" in text for figure in named), named


def test_explain_and_the_report_of_a_swap_are_shown() -> None:
    shown = [example for example, output in examples(READMES[0]) if output]
    assert len(shown) == 2
    assert "print(fastattn.explain(" in shown[0]
    assert "print(fastattn.swap_attention(" in shown[1]


@pytest.mark.parametrize("name", READMES)
def test_every_command_exists(name: str) -> None:
    lines = [line for block in blocks(name, "bash") for line in re.split(r"&&|\n", block)]
    shown = [line.strip() for line in lines if line.strip()]
    shown += re.findall(r"`((?:fastattn|python) [^`]+)`", (ROOT / name).read_text(encoding="utf-8"))
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    commands |= {group.name for group in cli.app.registered_groups}
    benches = {command.name or command.callback.__name__ for command in cli.bench.app.registered_commands}
    for words in map(shlex.split, shown):
        if words[0] == "fastattn":
            assert words[1] in commands
            assert words[1] != "bench" or words[2:] == [] or words[2] in benches
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        elif words[0] == "pip":
            extras = re.findall(r"\[(.*)\]", words[-1])
            assert set(extras) <= set(metadata("fastattn").get_all("Provides-Extra"))
        else:
            assert words == ["pytest"]


@pytest.mark.parametrize("name", READMES)
def test_every_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_the_feature_table_is_what_the_backends_answer(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    table = text.partition("<!-- features:start -->")[2].partition("<!-- features:end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    seen = set()
    for _, option, torch_cell, triton_cell in rows:
        for text, fields in OPTIONS_OF_SPEC.items():
            if text in option.replace("`", ""):
                seen.add(text)
                assert answer("torch", **fields) == torch_cell, option
                assert answer("triton", **fields) == triton_cell, option
    assert seen == set(OPTIONS_OF_SPEC)
    names = {row[0]: row[2:] for row in rows}
    assert names["float64"] == [answer("torch", dtype=torch.float64), answer("triton", dtype=torch.float64)]
    weights = next(cells for _, *cells in rows if "return_weights" in cells[0])[1:]
    modules = dict(zip(backends.NAMES, backends.BACKENDS))
    assert weights == [
        YES if hasattr(modules[n], "attention_weights_fwd") else NO for n in ("torch", "triton")
    ]


def answer(backend: str, **fields: object) -> str:
    """The table's mark for a spec with some fields set, on a device the backend is made for."""
    query = torch.empty(1, 1, 16, 64, dtype=torch.float16)
    spec = AttentionSpec.of(AttentionCall(query, query, query))
    if backend == "triton":
        spec = spec.replace(device="cuda", arch=90)
    module = dict(zip(backends.NAMES, backends.BACKENDS))[backend]
    return YES if module.why_not(spec.replace(**fields)) is None else NO
