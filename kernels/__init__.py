"""Triton kernels of fastattn: device code, its tiles and its launches."""
