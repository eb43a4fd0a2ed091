"""Published models by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED = ("*.json", "*.safetensors", "merges.txt", "*.jinja")  # weights as safetensors only: pickles run code


def from_hub(name: str) -> Path:
    """The folder of a model, downloaded once. Raises OSError where it cannot be had, and says why."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise OSError(f"there is no folder {name}; to download it: pip install huggingface-hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError:
        raise OSError(
            f"there is no folder {name}, and the Hugging Face hub does not answer: give the path of a folder, or try "
            "again with a network"
        ) from None
    except HfHubHTTPError as error:
        raise OSError(f"the Hugging Face hub has no model {name} that it would give: {error}") from None
