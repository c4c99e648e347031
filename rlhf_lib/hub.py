"""Is the Hugging Face hub within reach? Asked once and quickly, before anything is loaded from it.

Its own client tries five times with growing pauses: half a minute of silence on a machine without
network, and that for each file. Here the answer takes a few seconds at most.
"""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.utils import get_session

TIMEOUT = 5.0  # seconds


def unreachable() -> str | None:
    """Why the hub cannot be asked, in words; None when it answers."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of whichever HTTP package huggingface_hub came with
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
    return None
