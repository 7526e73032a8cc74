"""Whether tensors share memory, element by element: an op that writes to tensors has to know.

Two index tuples name one element where sum(d_i * stride_i) = distance has a solution in integers, each d_i within the
range that the sizes allow. Strides that are nested, as those of views of dense tensors are, leave a handful of
candidates for each d_i; the answer depends on sizes and strides only, so it is kept.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from torch import Tensor

from fastattn.strides import last_offset

MAX_CANDIDATES = 10_000  # of strides that are not nested; beyond, sharing is assumed

Terms = tuple[
    tuple[int, int, int], ...
]  # (stride, lowest, highest multiple of it), strides descending and positive


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor share memory, as in an expanded one."""
    return _repeats(tuple(tensor.shape), tensor.stride())


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether some element of `one` lies where an element of `other` does. Both have the same dtype."""
    first, second = one.untyped_storage(), other.untyped_storage()
    gap = (
        second.data_ptr() - first.data_ptr()
    )  # one array may have several storages, as after torch.from_numpy
    if gap >= first.nbytes() or -gap >= second.nbytes():
        return False
    size = one.element_size()
    distance = other.data_ptr() - one.data_ptr()
    if distance % size:
        return _ranges_meet(one, other, distance, size)
    return _meet(tuple(one.shape), one.stride(), tuple(other.shape), other.stride(), distance // size)


@lru_cache(maxsize=1024)
def _repeats(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return False
    ranges = [(stride, size - 1) for size, stride in zip(shape, strides) if size > 1]
    ranges.sort()
    reach = 0
    for stride, most in ranges:
        if stride <= reach:
            break
        reach += stride * most
    else:
        return False  # every stride steps over all that the smaller ones reach
    if len({stride for stride, _ in ranges}) < len(ranges) or ranges[0][0] == 0:
        return True
    # two different index tuples: try each dimension as the first in which they differ, by one or more
    for lead, (stride, most) in enumerate(ranges):
        terms = [(stride, 1, most)]
        terms += [(other, -reach, reach) for other, reach in ranges[lead + 1 :]]
        if _solvable(_merged(terms), 0):
            return True
    return False


@lru_cache(maxsize=1024)
def _meet(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    other_shape: tuple[int, ...],
    other_strides: tuple[int, ...],
    distance: int,
) -> bool:
    if 0 in shape or 0 in other_shape:
        return False
    terms = [(stride, 0, size - 1) for size, stride in zip(shape, strides)]
    terms += [(stride, 1 - size, 0) for size, stride in zip(other_shape, other_strides)]
    return _solvable(_merged(terms), distance)


def _ranges_meet(one: Tensor, other: Tensor, distance: int, size: int) -> bool:
    """Whether the byte ranges from first to last element overlap; for elements not aligned to each other."""
    first, second = (size * (1 + last_offset(t)) for t in (one, other))
    return bool(one.numel() and other.numel()) and distance < first and -distance < second


def _merged(terms: list[tuple[int, int, int]]) -> Terms:
    """Terms of equal strides as one, whose range is the sum of theirs; without strides of 0, which move nothing."""
    ranges: dict[int, tuple[int, int]] = {}
    for stride, lowest, highest in terms:
        low, high = ranges.get(stride, (0, 0))
        ranges[stride] = (low + lowest, high + highest)
    return tuple((s, *ranges[s]) for s in sorted(ranges, reverse=True) if s > 0 and ranges[s] != (0, 0))


def _solvable(terms: Terms, target: int) -> bool:
    """Whether sum(d_i * stride_i) = target for some d_i within their ranges; True too where the search is too long."""
    divisors, lows, highs = [0], [0], [0]  # of the terms from i on, built from the end
    for stride, lowest, highest in reversed(terms):
        divisors.append(gcd(divisors[-1], stride))
        lows.append(lows[-1] + stride * lowest)
        highs.append(highs[-1] + stride * highest)
    divisors.reverse()
    lows.reverse()
    highs.reverse()
    waiting, candidates = [(0, target)], 0
    while waiting:
        place, rest = waiting.pop()
        if not lows[place] <= rest <= highs[place] or (divisors[place] and rest % divisors[place]):
            continue
        if place == len(terms):
            return True  # rest is 0: nothing else lies between 0 and 0
        stride, lowest, highest = terms[place]
        start = max(lowest, -((highs[place + 1] - rest) // stride))
        stop = min(highest, (rest - lows[place + 1]) // stride)
        candidates += max(0, stop - start + 1)
        if candidates > MAX_CANDIDATES:
            return True
        waiting.extend((place + 1, rest - number * stride) for number in range(start, stop + 1))
    return False
