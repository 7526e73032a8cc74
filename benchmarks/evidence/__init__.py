"""The evidence of a machine with a GPU, in minutes: checks, probes, the extension's first run, and a run of all."""
