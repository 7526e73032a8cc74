"""What a machine with a GPU can show in minutes: checks, probes, the extension's first run, and the run of them all."""
