"""Models on fastattn's attention."""

from fastattn.models.config import GPTConfig as GPTConfig
from fastattn.models.decoder import GPT as GPT
from fastattn.models.families import load as load
