"""docs/: every Python block runs, or says why not and what holds it; what the pages name exists."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pages import DOCS, PAGES, ROOT, Block, all_blocks, blocks_of, test_exists

import fastattn
from fastattn.integrations import flash_attn

BLOCKS = all_blocks()
LANGUAGES = ("python", "bash", "text", "toml", "yaml")
PYTHON = [block for block in BLOCKS if block.language == "python"]
NOT_RUN = re.compile(r"not run: needs .{10,}")
RUN_BY = re.compile(r"run by (\S+)")
OPTIONAL = ("transformers", "diffusers")
SWAP = (DOCS / "swap.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "block", [b for b in PYTHON if not b.note], ids=[b.name for b in PYTHON if not b.note]
)
def test_an_example_runs(
    block: Block, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in OPTIONAL:
        if package in block.code and find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if "integrations.torch.register" in block.code and not hasattr(
        torch.nn.attention, "list_flash_attention_impls"
    ):
        pytest.skip("this torch has no registry of flash-attention implementations")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, block.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_every_block_says_its_language_and_why_it_is_not_run() -> None:
    assert [block.name for block in BLOCKS if block.language not in LANGUAGES] == []
    for block in PYTHON:
        compile(block.code, block.name, "exec")  # also of what is not run
        if block.note and not NOT_RUN.fullmatch(block.note):
            by = RUN_BY.fullmatch(block.note)
            assert by, f"{block.name}: {block.note!r} is no reason not to run it"
            assert test_exists(by[1]), f"{block.name}: {by[1]} does not exist"


def test_a_block_is_found_wherever_it_stands() -> None:
    page = (
        "a\n\n```python\none\n```\n\n- item\n\n    <!-- not run: needs x -->\n    ~~~py\n    two\n\n    ~~~\n"
    )
    first, second = blocks_of(page, "page")
    assert (first.language, first.code, first.line, first.note) == ("python", "one\n", 3, "")
    assert (second.language, second.code.strip(), second.note) == ("py", "two", "not run: needs x")
    with pytest.raises(AssertionError, match="no end"):
        blocks_of("```python\n", "page")


def test_the_marker_of_a_test_that_does_not_exist_is_noticed() -> None:
    assert test_exists("tests/test_docs.py::test_an_example_runs")
    assert not test_exists("tests/test_docs.py::test_of_nothing")
    assert not test_exists("tests/nothing.py::test_an_example_runs")


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(DOCS).as_posix() for page in PAGES])
def test_what_a_page_names_exists(page: Path) -> None:
    """Paths in links and commands, the package's functions, and tests."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        made = link == "examples.md"  # by site_hooks.py
        assert made or "://" in link or (page.parent / link).exists(), link
    for name in re.findall(r"`fastattn\.(\w+)\(", text):
        assert hasattr(fastattn, name), name
    for test in re.findall(r"`(tests/[\w/]+\.py::\w+(?:::\w+)?)`", text):
        assert test_exists(test), test
    for path in re.findall(r"`((?:tests|kernels|csrc|benchmarks|examples)/[\w/]+\.\w+)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=lambda block: block.name)
def test_every_command_exists(block: Block) -> None:
    from typer.main import get_command

    from fastattn.cli import app

    for line in re.split(r"&&|\n", block.code.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words and words[0] == "python" and words[1].endswith(".py") and "NAME" not in words[1]:
            assert (ROOT / words[1]).is_file(), line
        if not words or words[0] != "fastattn":
            continue
        command = get_command(app)
        for word in words[1:]:
            inner = getattr(command, "commands", {})
            if not inner:
                break
            if not word.startswith("-"):
                assert word in inner, line
                command = inner[word]
        options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
        said = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert {name for name in said if "." not in name} <= {*options, "--help"}, (
            line
        )  # --section.key is its own


def test_swap_md_shows_every_way_of_its_table() -> None:
    examples = re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```$", SWAP, re.MULTILINE | re.DOTALL)
    ways = re.findall(r"^\| .* \| `(.+)` \|$", SWAP, re.MULTILINE)
    assert len(ways) == 7
    for way, (_, example) in zip(ways, examples):
        assert way.split("(")[0].split("`, `")[0] in example
    for name in re.findall(r"`(flash_attn_\w+|\w*pad_input)`", SWAP):
        assert hasattr(flash_attn, name)


@pytest.mark.parametrize("page", ["index.md", "index.zh.md"])
def test_the_start_pages_list_every_extra(page: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    table = re.findall(
        r"^\| (`\w+`.*?) \| .* \| .*\|$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(re.findall(r"`(\w+)`", " ".join(table))) == sorted(extras)


def test_every_answer_of_the_faq_names_a_test() -> None:
    """`test_what_a_page_names_exists` looks for them."""
    sections = re.split(r"^#+ ", (DOCS / "faq.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    answers = [section for section in sections if "\n\nTests: " in section]
    questions = re.findall(r"^### ", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(answers) == len(questions) >= 25
    for answer in answers:
        named = answer.partition("\n\nTests: ")[2].strip()
        assert re.fullmatch(r"(`tests/[\w/]+\.py::\w+`(,\s|$))+", named), answer.partition("\n")[0]
