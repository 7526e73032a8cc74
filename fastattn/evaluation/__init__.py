"""Metrics of predictions against references, over whole sets; independent of models and tokenizers."""

from fastattn.evaluation.report import Report

__all__ = ["Report"]
