"""What every kernel needs is computed in one place: which tile a program owns, and quotients rounded up."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECODERS = {
    ("primitives.py", "program_coordinates"),
    ("primitives.py", "score_tile_coordinates"),
    ("softmax.py", "row_coordinates"),  # rows of strided tensors, whose numbers may need 64 bits
}


def decoders(source: str) -> set[str]:
    """The functions that divide the number of their program."""
    found = set()
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        numbers = {
            target.id
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and _has_program(node.value, set())
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        divided = (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, (ast.FloorDiv, ast.Mod))
            and _has_program(node.left, numbers)
            for node in ast.walk(function)
        )
        if any(divided):
            found.add(function.name)
    return found


def _has_program(node: ast.expr, numbers: set[str]) -> bool:
    """Whether an expression is made of the program's number alone; within a call it is another number."""
    if isinstance(node, ast.BinOp):
        return _has_program(node.left, numbers)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "program_id":
            return isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
        return isinstance(node.func, ast.Attribute) and _has_program(node.func.value, numbers)
    return isinstance(node, ast.Name) and node.id in numbers


def test_numbers_of_programs_are_decoded_by_the_functions_for_it() -> None:
    found = {
        (path.name, name)
        for path in (ROOT / "kernels").glob("*.py")
        for name in decoders(path.read_text(encoding="utf-8"))
    }
    assert found == DECODERS


@pytest.mark.parametrize(
    "line", ["tile = tl.program_id(0) % tiles", "p = tl.program_id(0).to(tl.int64)\n    row = p // parts"]
)
def test_decoding_by_hand_is_noticed(line: str) -> None:
    assert decoders(f"def kernel(tiles, parts):\n    {line}\n") == {"kernel"}
    assert decoders("def kernel(x):\n    tl.store(x + tl.program_id(0), 1 // 2)\n") == set()


ROUNDED_UP = {  # the functions themselves, and why others do without them
    "fastattn/integers.py",  # cdiv
    "csrc/device/config.cuh",  # ceil_div
    "fastattn/data/best_fit.py",  # of arrays
    "csrc/divisor.h",  # of 128 bits, on the host alone
    "kernels/attention_bwd_splits.py",  # of constants in a kernel
}


def test_quotients_are_rounded_up_by_one_function_in_each_language() -> None:
    found = set()
    for folder in ("csrc", "kernels", "fastattn"):
        for path in (ROOT / folder).rglob("*"):
            linked = path.is_relative_to(ROOT / "fastattn" / "kernels")
            if path.suffix in (".py", ".cpp", ".cuh", ".h", ".cu") and not linked:
                text = path.read_text(encoding="utf-8")
                divided = "//" if path.suffix == ".py" else "/"
                if re.search(rf"\+ [\w.<>()]+ - 1\) {divided}|-\(-[\w.\[\]() -]+//", text):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == ROUNDED_UP
