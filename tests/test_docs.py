"""docs/swap.md keeps its word: its examples run, the names it gives exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.integrations import flash_attn

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "swap.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("title", "example"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_runs(title, example, capsys):
    for package in ("transformers", "diffusers"):
        if package in example and find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if "integrations.torch.register" in example and not hasattr(
        torch.nn.attention, "list_flash_attention_impls"
    ):
        pytest.skip("this torch has no registry of flash-attention implementations")
    exec(compile(example, f"docs/swap.md: {title}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_every_section_has_its_example_and_every_door_its_section():
    assert len(EXAMPLES) == PAGE.count("\n## ") == 8
    doors = re.findall(r"^\| .* \| `(.+)` \|$", PAGE, re.MULTILINE)
    assert len(doors) == 6
    for door, (_, example) in zip(doors, EXAMPLES):
        assert door.split("(")[0].split("`, `")[0] in example


def test_names_exist():
    for name in re.findall(r"fastattn\.(\w+)\(", PAGE):
        assert hasattr(fastattn, name) or name == "register"
    for name in re.findall(r"`(flash_attn_\w+|\w*pad_input)`", PAGE):
        assert hasattr(flash_attn, name)
