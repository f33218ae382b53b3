"""What /metrics tells Prometheus: counts of the endpoint, and what the engine says of itself."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ..progressive.generation import Outcome
from .engine import TextEngine

CONTENT_TYPE = "text/plain; version=0.0.4"
_OF_NOW = (
    "waiting",
    "running",
    "most_running",
    "kv_bytes",
    "most_kv_bytes",
    "kv_budget",
    "stopped_bounds",
)
"""Figures of the engine that don't count up."""
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one app, in a registry of its own."""

    def __init__(self, engine: TextEngine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tierhints_requests",
            "Requests to the API, by what became of them",
            ["outcome"],
            registry=self.registry,
        )
        """Outcomes: answered, disconnected, or the code or status of the error."""
        self.tokens = Counter(
            "tierhints_tokens",
            "Tokens of prompts and of answers, and drafted ones that were taken back",
            ["kind"],
            registry=self.registry,
        )
        self.answers = Counter(
            "tierhints_answers",
            "Answers by the tier they ended at, and by how their bound is known",
            ["tier", "kind"],
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "tierhints_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "tierhints_request_seconds",
            "From a request's arrival to its end, where it was answered",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine))

    def count(self, outcome: Outcome, *, new_tokens: int) -> None:
        """Count an answer."""
        self.tokens.labels("prompt").inc(outcome.prompt_tokens)
        self.tokens.labels("completion").inc(new_tokens)
        self.tokens.labels("rejected").inc(outcome.rejected_tokens)
        self.answers.labels(outcome.quality.tier, str(outcome.quality.kind)).inc()

    def page(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Asks the engine at each scrape: every figure that it has is a metric of that name."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Return the engine's figures."""
        for name, value in asdict(self._engine.stats()).items():
            metric, help = f"tierhints_engine_{name}", f"{name.replace('_', ' ')} of the engine"
            family = GaugeMetricFamily if name in _OF_NOW else CounterMetricFamily
            if not isinstance(value, dict):
                yield family(metric, help, value=value)
                continue
            labelled = family(metric, help, labels=["name"])
            for label, number in value.items():
                labelled.add_metric([label], number)
            yield labelled


def join_pages(pages: Mapping[str, bytes], *, label: str) -> bytes:
    """Return one page of several: every figure gets a label with the name of its page."""
    registry = CollectorRegistry()
    registry.register(_JoinedCollector(pages, label))
    return generate_latest(registry)


class _JoinedCollector(Collector):
    """The figures of pages, those of one name together, as the format wants it."""

    def __init__(self, pages: Mapping[str, bytes], label: str) -> None:
        self._pages = pages
        self._label = label

    def collect(self) -> Iterable[Metric]:
        """Return the pages' figures."""
        joined: dict[str, Metric] = {}
        for name, page in self._pages.items():
            for family in text_string_to_metric_families(page.decode()):
                empty = Metric(family.name, family.documentation, family.type)
                whole = joined.setdefault(family.name, empty)
                for sample in family.samples:
                    labels = {**sample.labels, self._label: name}
                    whole.samples.append(sample._replace(labels=labels))
        return joined.values()
