"""Checks on a machine with a GPU: random calls, probes, the extension's first run, and a run of everything."""
