"""Pages of several replicas on one."""

from prometheus_client.parser import text_string_to_metric_families

from lib.serving.metrics import Metrics, join_pages
from tests.plain_engine import PlainEngine


def test_each_figure_says_whose_it_is_and_figures_of_a_name_are_together(
    engine: PlainEngine,
) -> None:
    pages = {}
    for count, name in enumerate(("one", "two"), start=1):
        metrics = Metrics(engine)
        metrics.requests.labels("answered").inc(count)
        metrics.seconds.observe(count)
        pages[name] = metrics.page()
    page = join_pages(pages, label="replica").decode()
    found = {family.name: family for family in text_string_to_metric_families(page)}
    assert page.count("# TYPE tierhints_requests_total") == 1
    values = {
        (sample.labels["replica"], sample.labels["outcome"]): sample.value
        for sample in found["tierhints_requests"].samples
    }
    assert values == {("one", "answered"): 1, ("two", "answered"): 2}
    assert {sample.labels["replica"] for sample in found["tierhints_request_seconds"].samples} == {
        "one",
        "two",
    }
    alone = {family.name for family in text_string_to_metric_families(pages["one"].decode())}
    assert set(found) == alone


def test_none_are_none() -> None:
    assert join_pages({}, label="replica") == b""
