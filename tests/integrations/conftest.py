"""Fixtures that the tests of integrations share."""

import pytest

import fastattn


@pytest.fixture
def calls(monkeypatch):
    """The options of every attention call."""
    from fastattn.integrations import transformers as integration

    seen = []
    monkeypatch.setattr(
        integration, "attention", lambda *a, **k: seen.append(k) or fastattn.attention(*a, **k)
    )
    return seen
