"""Every model type that can be read, as one tuple."""

from __future__ import annotations

from typing import Any

from fastattn.models.checkpoint.decoders import LLAMA_LINE
from fastattn.models.checkpoint.encoder_decoder import ENCODER_DECODERS as ENCODER_DECODERS
from fastattn.models.checkpoint.encoders import ENCODERS as ENCODERS
from fastattn.models.checkpoint.gpt2 import GPT2, OWN
from fastattn.models.checkpoint.names import Family

DECODERS: tuple[Family, ...] = (GPT2, *LLAMA_LINE, OWN)  # GPT loads them
FAMILIES = DECODERS + ENCODERS + ENCODER_DECODERS


def family_for(config: Any, families: tuple[Family, ...]) -> Family:
    """The family of config.model_type if its config.json can say all of a config, else the first whose can.

    Raises:
        ValueError: none can; the message holds what each lacks.
    """
    kind = getattr(config, "model_type", None)
    refusals = []
    for family in sorted(families, key=lambda family: family.model_type != kind):
        try:
            family.write_config(config)
        except ValueError as error:
            refusals.append(f"{family.model_type}: {error}")
        else:
            return family
    raise ValueError(f"config: no model type can say it: {'; '.join(refusals)}")
