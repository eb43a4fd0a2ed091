"""Plans along a line, and paths in draft trees, as tests of backbones use them."""

from collections.abc import Sequence

from seriatim.factorization.line import LinePlan, LineShape


def run(known: int, base: int = 0, parent: tuple[int, ...] | None = None) -> LinePlan:
    """Known slots behind `base` cached ones, then the nodes of a draft."""
    return LinePlan(LineShape(known, len(parent or ()), parent), base, 0, 1000)


def path_to(parent: Sequence[int], node: int) -> list[int]:
    """From the root to a node."""
    path = []
    while node >= 0:
        path.append(node)
        node = parent[node]
    return path[::-1]
