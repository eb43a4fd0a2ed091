"""What is counted and timed, in Prometheus' format; in a registry of its own, so that two servers may live together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
STATE = {
    "running": "texts that are written at present", "waiting": "texts that wait to be begun",
    "memory_bytes": "keys and values that are held", "tokens_per_second": "new tokens, over the last ten seconds",
}  # fmt: skip
FIGURES = {
    "steps": "forwards of the model", "tokens": "new tokens", "prompt_tokens": "tokens of prompts that were read",
    "reused_tokens": "tokens of prompts that were remembered", "drafted": "tokens that were drafted",
    "accepted": "drafted tokens that stood", "finished": "texts that ended", "cancelled": "texts that nobody wanted",
    "failed": "texts that the model failed on", "refused": "texts that were not taken, as too many waited",
}  # fmt: skip


class Metrics:
    """Counters and clocks of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        said: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("seriatim_requests", "answered requests", ("path", "status"), **said)
        self.open = Gauge("seriatim_requests_open", "requests that are being answered", **said)
        self.first = Histogram(
            "seriatim_first_token_seconds", "from a request to its first token", ("model",), buckets=FIRST, **said
        )
        self.between = Histogram(
            "seriatim_between_tokens_seconds", "between two tokens of a text", ("model",), buckets=BETWEEN, **said
        )
        self.whole = Histogram(
            "seriatim_request_seconds", "from a request to the end of a text or pictures", ("model",), buckets=WHOLE,
            **said,
        )  # fmt: skip
        self.accepted = Histogram(
            "seriatim_accepted_length", "tokens that a step added to a text", ("model",), buckets=LENGTHS, **said
        )

    def watch(self, figures: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        """Tell the figures of these models, by name, whenever somebody asks."""
        self.registry.register(_Figures(figures))

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)


class _Figures:
    """Figures that others count."""

    def __init__(self, figures: Callable[[], Mapping[str, Mapping[str, float]]]):
        self.figures = figures

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        now = self.figures()
        for kinds, family in ((FIGURES, CounterMetricFamily), (STATE, GaugeMetricFamily)):
            for name, about in kinds.items():
                metric = family(f"seriatim_{name}", about, labels=("model",))
                for model, said in now.items():
                    if name in said:
                        metric.add_metric((model,), said[name])
                yield metric
