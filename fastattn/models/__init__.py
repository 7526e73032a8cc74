"""Models on fastattn's attention."""

from fastattn.models.config import GPTConfig as GPTConfig
from fastattn.models.gpt import GPT as GPT
