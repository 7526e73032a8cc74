"""Calls to measure or check: their sizes, options and random inputs."""
