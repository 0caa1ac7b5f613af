"""Whether the Hugging Face Hub may be asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import huggingface_hub
from huggingface_hub import constants as hub

from flux2.weights.sources import looks_local


def is_offline(places: Iterable[object]) -> bool:
    """Whether one of `places` may be on the Hugging Face Hub, which cannot be reached; then as with HF_HUB_OFFLINE=1.

    What was downloaded before is used then, or the error comes at once: left alone, the Hub's library would try again
    for half a minute and say so each time.
    """
    remote = any(isinstance(place, str) and not looks_local(place) for place in places)
    if not remote or hub.is_offline_mode():
        return False
    try:
        huggingface_hub.get_session().head(hub.ENDPOINT, timeout=10)
    except Exception:  # of the HTTP library that it is built on
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are not imported yet
        hub.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return True
    return False
