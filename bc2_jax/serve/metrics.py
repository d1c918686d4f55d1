"""Prometheus metrics; all names start with bc2_."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bc2_jax.serve.stats import Observation, Stats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_HISTOGRAMS: dict[Observation, tuple[str, str, tuple[float, ...]]] = {
    "queue_s": ("bc2_queue_seconds", "Seconds from submission to a row.", _SECONDS),
    "first_token_s": ("bc2_time_to_first_token_seconds", "Seconds from submission to the first token.", _SECONDS),
    "token_s": ("bc2_time_per_output_token_seconds", "Seconds between tokens of a request.", _SECONDS),
    "total_s": ("bc2_request_seconds", "Seconds from submission to the last token.", _SECONDS),
    "prompt_tokens": ("bc2_request_prompt_tokens", "Tokens of a prompt.", _TOKENS),
    "generated_tokens": ("bc2_request_generated_tokens", "New tokens of a request.", _TOKENS),
    "step_s": ("bc2_step_seconds", "Seconds of a decoding step.", _SECONDS),
    "host_s": ("bc2_host_seconds", "Seconds of the host between a turn's results and the next dispatch.", _SECONDS),
}
_COUNTERS = {
    "rejected": ("bc2_rejected_requests", "Requests for which the queue was full."),
    "prompt_tokens": ("bc2_prompt_tokens", "Tokens of prompts."),
    "generated_tokens": ("bc2_generated_tokens", "New tokens."),
    "cached_tokens": ("bc2_prefix_cached_tokens", "Prompt tokens found in the cache."),
    "compilations": ("bc2_compilations_after_start", "Programs compiled after the start; anything but 0 is a fault."),
}
_GAUGES = {
    "waiting": ("bc2_requests_waiting", "Requests in the queue."),
    "running": ("bc2_requests_running", "Requests that have a row."),
    "rows": ("bc2_rows", "Requests that can run at the same time."),
    "slots": ("bc2_cache_slots", "Tokens for which the cache has room."),
    "slots_used": ("bc2_cache_slots_used", "Tokens of running requests in the cache."),
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(metric, text, buckets=buckets, registry=self._registry)
            for name, (metric, text, buckets) in _HISTOGRAMS.items()
        }
        self._http = Counter(
            "bc2_http_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )

    def observe(self, name: Observation, value: float) -> None:
        """The `observe` of a `Service`."""
        self._histograms[name].observe(value)

    def count_http(self, route: str, status: int) -> None:
        self._http.labels(route, str(status)).inc()

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Reports a service's counters and gauges whenever the metrics are read."""
        self._registry.register(_Reader(stats))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Reader(Collector):
    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def describe(self) -> Iterator[Metric]:
        """Empty, so that the registry does not query a service that is not ready."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        stats: Any = self._stats()
        requests = CounterMetricFamily("bc2_requests", "Requests of the engine by outcome.", labels=["outcome"])
        for outcome, count in sorted(stats.requests.items()):
            requests.add_metric([outcome], count)
        yield requests
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, value=getattr(stats, name))
        for name, (metric, text) in _GAUGES.items():
            yield GaugeMetricFamily(metric, text, value=getattr(stats, name))
