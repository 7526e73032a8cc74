"""Generate tokens with any model that has the `CausalLM` protocol: a cache and a step, or a decoder."""

from fastattn.generation.decoding import generate as generate
from fastattn.generation.protocol import CausalLM as CausalLM
from fastattn.generation.protocol import Decoder as Decoder
from fastattn.generation.streaming import stream_ids as stream_ids
from fastattn.generation.streaming import stream_text as stream_text
