"""Numbers that several layers share."""

IGNORE_INDEX = -100  # the target that losses leave out, as in torch.nn.functional.cross_entropy
MAX_INT32 = 2**31 - 1  # sizes, token ids and positions are 32-bit integers in the kernels
