"""Measuring: rounds, processes, memory, errors against float64, counts, and the command line of the benches."""
