"""Frequencies of rotary positions, and the four ways by which models stretch them to longer sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class RotaryScaling:
    """How the rotary frequencies of a model are stretched, in the names of transformers' `rope_parameters`.

    linear: every frequency divided by `factor`.
    dynamic: a base that grows with the sequence's length beyond the original one ("dynamic NTK").
    yarn: low frequencies divided by `factor`, high ones kept, a linear ramp between the pairs that make `beta_slow`
        and `beta_fast` rotations within the original length; cos and sin are multiplied by `attention_factor`, or
        where that is None by a factor computed from `factor` and the two `mscale`. Peng et al. 2023, "YaRN".
    llama3: frequencies whose wavelength is above original / low_freq_factor divided by `factor`, those below
        original / high_freq_factor kept, between the two interpolated. Llama 3.1.
    """

    kind: Kind
    factor: float
    original_length: int  # tokens of a sequence that the unscaled frequencies are meant for
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """The factor of cos and sin."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _magnitude(self.factor, self.mscale) / _magnitude(self.factor, self.mscale_all_dim)
        return _magnitude(self.factor)


def _magnitude(factor: float, slope: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0


def frequencies(
    base: float, dim: int, scaling: RotaryScaling | None, lengths: Tensor | None, like: Tensor
) -> Tensor:
    """The angle per position of each of dim / 2 pairs, in the dtype and on the device of `like`: (dim/2,), or for
    dynamic scaling with lengths (..., 1), the sequences' tokens, (..., dim/2).
    """
    exponents = torch.arange(0, dim, 2, device=like.device).to(like.dtype) / dim
    if scaling is None:
        return 1.0 / base**exponents
    if scaling.kind == "dynamic":
        if lengths is None:
            return 1.0 / base**exponents
        grown = lengths.clamp(min=scaling.original_length).to(like.dtype)
        ratio = scaling.factor * grown / scaling.original_length - (scaling.factor - 1)
        return 1.0 / (base * ratio ** (dim / (dim - 2))) ** exponents
    plain = 1.0 / base**exponents
    if scaling.kind == "linear":
        return plain / scaling.factor
    return _yarn(base, dim, scaling, exponents) if scaling.kind == "yarn" else _llama3(plain, scaling)


def _yarn(base: float, dim: int, scaling: RotaryScaling, exponents: Tensor) -> Tensor:
    def pair_with(rotations: float) -> float:
        """The index, not rounded, of the pair that makes this many rotations within the original length."""
        return dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = (torch.arange(dim // 2, device=exponents.device).to(exponents.dtype) - low) / width
    kept = 1 - ramp.clamp(0, 1)
    periods = base**exponents
    return (1.0 / (scaling.factor * periods)) * (1 - kept) + (1.0 / periods) * kept


def _llama3(plain: Tensor, scaling: RotaryScaling) -> Tensor:
    longest = scaling.original_length / scaling.low_freq_factor
    shortest = scaling.original_length / scaling.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > longest, plain / scaling.factor, plain)
    smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smoothed = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where((wavelength >= shortest) & (wavelength <= longest), smoothed, stretched)
