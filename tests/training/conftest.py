"""Trainings so short that every epoch may be stopped within."""

import pytest

from basis.training import epochs


@pytest.fixture(autouse=True)
def _every_epoch_is_long(monkeypatch):
    monkeypatch.setattr(epochs, "LONG", -1.0)
