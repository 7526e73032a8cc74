"""A cycle model of Hopper: replays the hot loops of compiled kernels, without a GPU. It measures nothing."""
