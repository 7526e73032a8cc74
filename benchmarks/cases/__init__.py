"""The cases of each bench, and the steps and expected results of its providers."""
