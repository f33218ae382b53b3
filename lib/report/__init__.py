"""Results for people: text tables, plots and one self-contained HTML page."""

from .tables import benchmark_sections, benchmark_table

__all__ = ["benchmark_sections", "benchmark_table"]
