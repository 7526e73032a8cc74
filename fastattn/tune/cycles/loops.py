"""Finds the loops of a kernel that hold its matrix products, and the most frequent path through each."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.tune.cycles.machine import Product
from fastattn.tune.cycles.sass import Function, Instruction

LEAVES = ("EXIT", "RET", "BRX")


@dataclass(frozen=True)
class Loop:
    """The instructions of one pass of a loop."""

    body: tuple[Instruction, ...]

    @property
    def products(self) -> list[Product]:
        """The products of a warpgroup in one pass."""
        return [product for each in self.body if (product := each.product) is not None]

    @property
    def flop(self) -> int:
        """Operations of these products."""
        return sum(product.flop for product in self.products)

    def count(self, kind: str) -> int:
        """The number of instructions of a kind."""
        return sum(each.kind.name == kind for each in self.body)


def hot_loops(function: Function) -> list[Loop]:
    """The innermost loops with products, in the order of the code."""
    code = function.instructions
    found = []
    for end, instruction in enumerate(code):
        begin = function.target(end) if instruction.opcode.startswith("BRA") else None
        if begin is not None and begin <= end and any(each.product for each in code[begin : end + 1]):
            found.append((begin, end))
    inner = [(a, b) for a, b in found if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)]
    paths = [_fullest_path(function, begin, end) for begin, end in inner]
    return [Loop(tuple(code[i] for i in path)) for path in paths if path]


def _fullest_path(function: Function, begin: int, end: int) -> list[int]:
    """The path from begin to end, inclusive, with the most products, then with the fewest instructions.

    Branches inside an innermost loop go forwards, so the best path from an instruction follows from the best paths of
    later instructions.
    """
    code = function.instructions
    best: dict[int, tuple[int, int, int]] = {}  # index -> (products, -instructions, next)
    for index in range(end, begin - 1, -1):
        own = int(code[index].product is not None)
        if index == end:
            best[index] = (own, -1, -1)
            continue
        ways = [(best[after][:2], after) for after in _followers(function, index, end) if after in best]
        if ways:
            (products, instructions), after = max(ways, key=lambda way: way[0])
            best[index] = (products + own, instructions - 1, after)
    path, index = [], begin
    while index in best:
        path.append(index)
        index = best[index][2]
    return path if path and path[-1] == end else []


def _followers(function: Function, index: int, end: int) -> list[int]:
    instruction = function.instructions[index]
    if instruction.opcode.startswith("BRA"):
        target = function.target(index)
        ahead = [target] if target is not None and index < target <= end else []
        return ahead + ([index + 1] if instruction.branches_conditionally else [])
    if instruction.opcode in LEAVES and not instruction.predicate:
        return []
    return [index + 1]
