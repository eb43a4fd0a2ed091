"""What the processor can do."""

from __future__ import annotations

from typing import Any

import torch


def capabilities() -> dict[str, Any]:
    """Its instructions by name, and `architecture`; empty where torch does not say."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())
