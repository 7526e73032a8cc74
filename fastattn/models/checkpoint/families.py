"""Every model type that can be read, as one tuple."""

from __future__ import annotations

from fastattn.models.checkpoint.decoders import LLAMA_LINE
from fastattn.models.checkpoint.encoder_decoder import ENCODER_DECODERS as ENCODER_DECODERS
from fastattn.models.checkpoint.encoders import ENCODERS as ENCODERS
from fastattn.models.checkpoint.gpt2 import GPT2, OWN
from fastattn.models.checkpoint.names import Family
from fastattn.models.checkpoint.names import family_for as family_for

DECODERS: tuple[Family, ...] = (GPT2, *LLAMA_LINE, OWN)  # GPT loads them
FAMILIES = DECODERS + ENCODERS + ENCODER_DECODERS
