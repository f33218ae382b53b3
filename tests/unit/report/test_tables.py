"""Benchmark documents as text."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from lib.report.decoding import decoding_table
from lib.report.tables import (
    benchmark_sections,
    benchmark_table,
    charged_overhead_pct,
    comparison_rows,
    format_ms,
    is_steady,
    tier_rows,
    transfer_ms,
)

MakeBenchmark = Callable[[str], dict[str, Any]]


def test_sections_name_every_quantity_and_how_it_was_measured(
    make_benchmark: MakeBenchmark,
) -> None:
    text = benchmark_sections(make_benchmark("real"))
    for title in ("baseline: all weights", "tiered: real (measured)", "impact: tiered against"):
        assert title in text
    for word in ("mean", "median", "p95", "tokens/s", "peak fast memory", "moved per forward"):
        assert text.count(word) >= 2, word
    assert "n = 20, 3 warm-up" in text
    assert "bit-identical" in text


def test_emulated_times_are_labelled(make_benchmark: MakeBenchmark) -> None:
    document = make_benchmark("emulated")
    assert "tiered: emulated (virtual clock)" in benchmark_sections(document)
    document["measured"] = "wall-clock"
    error = {"mean_us": 0.1, "p95_us": 0.2, "max_us": 0.9, "n": 40}
    document["tiered"]["stats"]["wait_error"] = error
    text = benchmark_sections(document)
    assert "tiered: emulated (emulated waits)" in text
    assert "0.10 us" in text and "max 0.90 us, n = 40" in text


def test_run_without_baseline_says_how_to_get_one(make_benchmark: MakeBenchmark) -> None:
    document = make_benchmark("real") | {"baseline": None, "impact": None}
    assert benchmark_sections(document).count("not measured  give --baseline") == 2
    assert "-" in benchmark_table([document])


def test_table_has_a_column_per_run_and_lines_up(make_benchmark: MakeBenchmark) -> None:
    documents = [make_benchmark("emulated"), make_benchmark("real")]
    rows = comparison_rows(documents)
    assert rows[0] == ["", "baseline", "tiered, emulated", "tiered, real"]
    assert rows[1] == ["", "measured", "virtual clock", "measured"]
    assert {len(row) for row in rows} == {4}
    lines = benchmark_table(documents).splitlines()
    assert len({len(line) for line in lines[: len(rows) + 1]}) == 1
    assert any("against each run's own baseline" in line for line in lines)


def test_no_documents() -> None:
    assert benchmark_table([]) == "no benchmark was run"


@pytest.mark.parametrize(("drift", "steady"), [(None, True), (9.9, True), (-10.1, False)])
def test_unsteady_machine_is_called_out(
    make_benchmark: MakeBenchmark, drift: float | None, steady: bool
) -> None:
    document = make_benchmark("real")
    document["baseline"]["drift_pct"] = drift
    assert is_steady(document) is steady
    assert ("not reliable" in benchmark_sections(document)) is not steady
    assert ("not reliable" in benchmark_table([document])) is not steady


def test_different_logits_are_not_hidden(make_benchmark: MakeBenchmark) -> None:
    document = make_benchmark("real")
    changed = {"logits_bit_identical": False, "max_abs_logit_difference": 0.25}
    document["impact"] |= changed
    assert "differ by 0.25" in benchmark_table([document])


def test_tier_rows_add_up(make_benchmark: MakeBenchmark) -> None:
    document = make_benchmark("real")
    rows = tier_rows(document)
    assert [row.tier for row in rows] == ["HBM", "CPU", "SSD"]
    assert sum(row.num_bytes for row in rows) == document["weight_bytes"]
    assert sum(row.num_blocks for row in rows) == document["num_blocks"]
    moved = sum(row.moved_bytes for row in rows)
    assert moved == pytest.approx(document["tiered"]["bytes_moved_per_forward"], abs=2)
    assert rows[0].transfer_ms == 0 and rows[2].transfer_ms > 0


def test_transfer_is_of_blocks_that_moved(make_benchmark: MakeBenchmark) -> None:
    document = make_benchmark("real")
    stats = document["tiered"]["stats"]
    before = transfer_ms(stats)
    for block in stats["blocks"].values():
        if not block["bytes_moved"]:
            block["transfer_seconds"] = 1.0  # time inside the hooks
    assert transfer_ms(stats) == before
    assert before == pytest.approx(sum(row.transfer_ms for row in tier_rows(document)))
    assert f"of it transfer              {format_ms(before)}" in benchmark_sections(document)


def test_what_a_virtual_clock_charged_is_a_figure_of_its_own(
    make_benchmark: MakeBenchmark,
) -> None:
    document = make_benchmark("emulated")
    charged = document["tiered"]["transfer_ms_per_forward"]
    percent = 100 * charged / document["baseline"]["latency_ms"]["median"]
    assert charged_overhead_pct(document) == pytest.approx(percent)
    row = ["charged by tiers", "-", f"{percent:+.1f} %", "-"]
    assert row in comparison_rows([document, make_benchmark("real")])
    for without in (make_benchmark("real"), document | {"baseline": None}):
        assert charged_overhead_pct(without) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1.23456, "1.235 ms"), (12.3456, "12.35 ms"), (1234.56, "1234.6 ms")],
)
def test_milliseconds(value: float | None, text: str) -> None:
    assert format_ms(value) == text


def test_exact_output_is_shown_beside_streaming(make_benchmark: MakeBenchmark) -> None:
    document = make_benchmark("real")
    for text in (benchmark_sections(document), benchmark_table([document])):
        assert re.search(r"^streamed, lossless +9\.5 ", text, re.MULTILINE)
        assert re.search(r"^exact +61\.2 ", text, re.MULTILINE)
        assert "5 windows of 11.6 tokens on average, 98.5 % of those judged were accepted" in text
        assert "256 of 256 tokens are the resident model's" in text
    part = document["exact"]
    unsure = {**part, "resident": None, "exact": {**part["exact"], "acceptance": None}}
    text = decoding_table(unsure)
    assert "are the streamed model's" in text and "resident" not in text and ", - of" in text
    assert "exact" not in benchmark_sections(make_benchmark("emulated"))
