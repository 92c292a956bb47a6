"""The server's counters, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class Counters:
    """Counters of one server.

    Attributes:
      requests: Requests by endpoint and status.
      seconds: Time from a request's head to the end of its response, by endpoint.
      first_token_seconds: Time to the first token of a streamed response.
      device_seconds: Time that the device's thread was busy, including waits for results, by work: `embed`, `write`,
        or `find` documents and their keys and values.
      tokens: Tokens by use: `embedded`, `read` as prompts, taken from a `cached` prefix, or `written`.
      compilations: Compiled programs.
    """

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("grit_jax_requests", "Requests", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            "grit_jax_request_seconds", "Time of a request", ["endpoint"], registry=registry, buckets=_SECONDS
        )
        self.first_token_seconds = Histogram(
            "grit_jax_first_token_seconds", "Time to the first token of a streamed response", registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.device_seconds = Counter(
            "grit_jax_device_seconds", "Time that the device's thread was busy", ["work"], registry=registry
        )
        self.tokens = Counter("grit_jax_tokens", "Tokens", ["kind"], registry=registry)
        self.compilations = Counter("grit_jax_compilations", "Compiled programs", registry=registry)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def add_gauges(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Adds numbers that are computed when read: a help text and a function by name."""
        for name, (help_text, function) in gauges.items():
            Gauge(f"grit_jax_{name}", help_text, registry=self._registry).set_function(function)

    def text(self) -> bytes:
        """All counters in Prometheus' text format."""
        return generate_latest(self._registry)

    def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compilations.inc()
