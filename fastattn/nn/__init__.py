"""Modules built on the attention op: drop-in multi-head attention, positions and transformer blocks."""
