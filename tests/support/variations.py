"""Configs with something else in them, each key in turn."""

from collections.abc import Iterator
from typing import Any


def variations(said: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The key, and the config without it; then with numbers doubled, and yes for no."""
    for key, value in said.items():
        yield key, {k: v for k, v in said.items() if k != key}
        if isinstance(value, bool):
            yield key, {**said, key: not value}
        elif isinstance(value, int | float):
            yield key, {**said, key: 2 * value}
