"""One query for each of several sequences on a CPU, each with the bits that it has alone: for the steps of decoders."""

from fastattn.backends.torch.key_blocks import KeyBlocks as KeyBlocks
from fastattn.backends.torch.key_blocks import whole_blocks as whole_blocks
