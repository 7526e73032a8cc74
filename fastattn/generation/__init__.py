"""Generate tokens with any model that has the `CausalLM` protocol: a cache and a step."""

from fastattn.generation.decoding import generate as generate
from fastattn.generation.protocol import CausalLM as CausalLM
