"""One query for each of several sequences on a CPU, all in the same operations: for the steps of decoders."""

from fastattn.backends.torch.key_blocks import KeyBlocks as KeyBlocks
from fastattn.backends.torch.key_blocks import whole_blocks as whole_blocks
from fastattn.backends.torch.single_query import has_fast_masks as has_fast_masks
