"""A record of what is loaded and freed of the encoders: what the tests of the caches share.

A test module says `pytest_plugins = ("encoder_helpers",)` to get the fixture.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from flux2.weights.loading import load_autoencoder, load_text_encoder
from train.encoding import text_encoders


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is loaded and freed, in order."""
    happened: list[str] = []

    def watched(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*arguments: Any) -> Any:
            gc.collect()
            part = load(*arguments)
            happened.append(f"{name} loaded")
            weakref.finalize(part, happened.append, f"{name} freed")
            return part

        return spy

    monkeypatch.setattr(text_encoders, "load_text_encoder", watched("text encoder", load_text_encoder))
    monkeypatch.setattr("train.encoding.prepare.load_autoencoder", watched("autoencoder", load_autoencoder))
    return happened
