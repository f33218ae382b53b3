"""A runtime's figures for Prometheus: asked for at each scrape, nothing is kept between them.

from prometheus_client import start_http_server
start_http_server(9100, registry=runtime_metrics(runtime))
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..extras import need_extra
from ..tiering import Runtime
from ..tiering.telemetry import ExpertStats, Stats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric


def runtime_metrics(runtime: Runtime) -> "CollectorRegistry":
    """Return a registry with the metrics of a runtime. Scrapes may come from another thread, and
    wait for a module of the running forward at most. Raises InputError without prometheus_client.
    """
    need_extra("monitor", "prometheus_client")
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(RuntimeCollector(runtime))
    return registry


class RuntimeCollector:
    """A collector for a registry of prometheus_client: ``registry.register`` takes it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def describe(self) -> "Iterable[Metric]":
        """Name nothing in advance: the runtime isn't asked when it is registered."""
        return ()

    def collect(self) -> "Iterable[Metric]":
        """Return what the runtime has done since attach, or since its figures were reset."""
        runtime, stats = self._runtime, self._runtime.stats()
        fast = {"used": stats.resident_bytes, "planned": runtime.plan.fast_bytes}
        limit = runtime.budget.get("HBM")
        if limit is not None:
            fast["limit"] = limit
        yield _gauge("fast_memory_bytes", "Weights in fast memory, and its limit", "kind", fast)
        yield _gauge("weight_bytes", "Weights by the tier they are in", "tier", _tier_bytes(stats))
        states = Counter(map(str, runtime.states().values()))
        yield _gauge("blocks", "Blocks by their state", "state", dict(sorted(states.items())))
        for name, help, value in (
            ("forwards", "Forwards", stats.forwards),
            ("moved_bytes", "Bytes brought into fast memory", stats.bytes_moved),
            ("waited_seconds", "Waited for weights on their way", stats.transfer_seconds),
            ("link_seconds", "Something was on its way", stats.link_seconds),
            ("refusals", "Refused by the veto", len(runtime.audit.rejections)),
        ):
            yield _counter(name, help, "", {"": value})
        if stats.experts is not None:
            found = _expert_uses(stats.experts)
            yield _counter("expert_uses", "Decoding's uses of experts below", "found", found)


def _tier_bytes(stats: Stats) -> Mapping[str, float]:
    return {tier: float(size) for tier, size in stats.bytes_per_tier.items()}


def _expert_uses(experts: ExpertStats) -> Mapping[str, float]:
    """Return uses by how the expert was found: there already, read ahead, read on demand."""
    return {"resident": experts.resident, "ahead": experts.useful, "read": experts.reads}


def _gauge(name: str, help: str, label: str, values: Mapping[str, float]) -> "Metric":
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"tierhints_{name}", help, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _counter(name: str, help: str, label: str, values: Mapping[str, float]) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"tierhints_{name}", help, labels=[label] if label else [])
    for value, number in values.items():
        family.add_metric([value] if label else [], number)
    return family
