"""Figures from predictions and references, of whole sets: knows no model and no tokenizer."""

from fastattn.evaluation.report import Report

__all__ = ["Report"]
