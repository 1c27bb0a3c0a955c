"""Metrics for Prometheus, by vLLM's names where it has them, so that its dashboards show them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quantspec.serving.requests import EngineStatistics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LABELS = ("model_name",)


class Metrics:
    """Counts and times of a server's requests, and of its engine as it is when somebody looks."""

    def __init__(self, statistics: Callable[[], EngineStatistics], model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(statistics, model_name))

        def histogram(name: str, text: str) -> Histogram:
            metric = Histogram(f"vllm:{name}", text, _LABELS, buckets=_SECONDS, registry=self._registry)
            return metric.labels(model_name)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token = histogram("inter_token_latency_seconds", "Between tokens, by those of a cycle.")
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self.ended = Counter(
            "vllm:request_success",
            "Choices that have ended, by why.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._model_name = model_name

    def watch(self, arrival: float) -> Watch:
        """Somebody who notes what becomes of a choice that was asked for at ``arrival``."""
        return Watch(self, arrival)

    def count_end(self, reason: str) -> None:
        """Count a choice that has ended."""
        self.ended.labels(self._model_name, reason).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self._registry)


class Watch:
    """Notes times of one choice."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._newest: float | None = None

    def tokens(self, count: int) -> None:
        """``count`` tokens have come."""
        now = time.monotonic()
        if not count:
            return
        if self._newest is None:
            self._metrics.first_token.observe(now - self._arrival)
        else:
            self._metrics.inter_token.observe((now - self._newest) / count)
        self._newest = now

    def ended(self, reason: str) -> None:
        """The choice has ended."""
        self._metrics.whole.observe(time.monotonic() - self._arrival)
        self._metrics.count_end(reason)


class _OfEngine(Collector):
    def __init__(self, statistics: Callable[[], EngineStatistics], model_name: str) -> None:
        self._statistics = statistics
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """What the engine counts."""
        now = self._statistics()
        gauges = {
            "num_requests_running": now.running,
            "num_requests_waiting": now.waiting,
            "kv_cache_usage_perc": now.pages_used / now.pages_total,
        }
        counters = {
            "num_preemptions": now.preemptions,
            "prompt_tokens": now.prompt_tokens,
            "generation_tokens": now.generated_tokens,
            "prefix_cache_queries": now.prompt_tokens,
            "prefix_cache_hits": now.cached_prompt_tokens,
            "spec_decode_num_drafts": now.drafts,
            "spec_decode_num_draft_tokens": now.draft_tokens,
            "spec_decode_num_accepted_tokens": now.accepted_tokens,
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                family = kind(f"vllm:{name}", name.replace("_", " "), labels=_LABELS)
                family.add_metric([self._model_name], value)
                yield family
