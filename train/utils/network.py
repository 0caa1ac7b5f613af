"""Detection of a missing network, so that the Hugging Face Hub is not contacted without need."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import huggingface_hub
from huggingface_hub import constants as hub

from flux2.weights.sources import looks_local


def is_offline(places: Iterable[object]) -> bool:
    """Return whether one of `places` may be on the Hugging Face Hub and the Hub cannot be reached.

    In that case, switches to HF_HUB_OFFLINE=1: earlier downloads are used, or the error comes at once. Otherwise the
    Hub's library would retry for half a minute, with a message for each attempt.
    """
    remote = any(isinstance(place, str) and not looks_local(place) for place in places)
    if not remote or hub.is_offline_mode():
        return False
    try:
        huggingface_hub.get_session().head(hub.ENDPOINT, timeout=10)
    except Exception:  # exceptions of the HTTP library are no part of the Hub's interface
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
        hub.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return True
    return False
