import numpy as np
import pytest

from scripts.experiments.study.grid import SEEDS, VARIANTS, list_runs
from scripts.experiments.study.measure import top_overlap
from scripts.experiments.study.summary import CACHES, cluster_interval, flatten, judge, summarize


def point(step: int, rho: float, loss: float) -> dict[str, object]:
    return {
        "step": step,
        "blocks": {
            "adam": {"within": rho, "measured_over_predicted": 1.0},
            "fisher_true": {"within": 0.9},
        },
        "allocation": {"3.0": {"adam": {"over_true": loss}}},
        "floors": {"0.01": {"adam": {"steps": 0.1}}},
        "caches": {name: {"adam": {"over_true": 1.0}} for name in CACHES},
    }


def run(seed: int, rho: float, variant: str = "base", loss: float = 1.0) -> dict[str, object]:
    return {
        "corpus": "python",
        "size": "base",
        "variant": variant,
        "seed": seed,
        "checkpoints": [point(5, rho - 0.1, loss), point(10, rho, loss)],
    }


def test_variants_are_compared_with_their_own_seed() -> None:
    runs = [run(0, 0.9), run(1, 0.5), run(0, 0.8, "clip off"), run(1, 0.4, "clip off")]
    change = summarize(runs)["variants"]["clip off"]["blocks.adam.within"]
    assert change["mean"] == pytest.approx(-0.1)
    assert change["max"] - change["min"] == pytest.approx(0)
    assert change["n"] == 2


def test_only_plain_runs_are_in_the_final_figures() -> None:
    summary = summarize([run(0, 0.9), run(1, 0.7), run(0, 0.1, "clip off")])
    assert summary["final"]["blocks.adam.within"]["mean"] == pytest.approx(0.8)
    assert summary["final"]["blocks.adam.within"]["n"] == 2
    assert summary["by_step"]["5"]["blocks.adam.within"]["mean"] == pytest.approx(0.7)


def test_a_criterion_is_met_only_if_its_whole_interval_is() -> None:
    good, wide = [
        [(("python", seed), flatten(point(1, 0.9, loss))) for seed, loss in enumerate(losses)]
        for losses in (
            (1.0, 1.01, 1.02),
            (0.9, 1.0, 1.3),
        )
    ]
    name = "KL of Adam's plan over the true Fisher's at 3.0 bits"
    assert judge(good)[name]["met"]
    assert not judge(wide)[name]["met"]
    assert all(row["met"] for row in judge(good).values())


def test_runs_of_one_cluster_are_no_more_than_one_model() -> None:
    values, seeds = [1.0, 1.2, 0.9, 1.1, 1.3, 0.8], range(6)
    apart = [("python", seed) for seed in seeds]
    low, high = cluster_interval(values, apart)  # type: ignore[misc]
    spread = 2.571 * np.std(values, ddof=1) / np.sqrt(6)  # Student's, 5 degrees of freedom
    assert high - low == pytest.approx(2 * spread, rel=0.1)
    # The same runs thrice, all of one cluster each: not a bit more certain.
    again = cluster_interval(
        [v for v in values for _ in range(3)], [c for c in apart for _ in "abc"]
    )
    assert again == pytest.approx((low, high))
    assert cluster_interval(values, [("python", 0)] * 6) is None


@pytest.mark.parametrize("true_mean", [0.0, 1.0])
def test_the_interval_of_six_clusters_covers_the_mean(true_mean: float) -> None:
    random = np.random.default_rng(0)
    clusters = [("c", seed) for seed in (0, 0, 0, 1, 1, 1, 2, 3, 4, 5)]
    covered = 0
    for _ in range(100):
        level = dict(enumerate(random.normal(true_mean, 1, size=6)))
        values = [level[seed] + random.normal(0, 0.3) for _, seed in clusters]
        low, high = cluster_interval(values, clusters)  # type: ignore[misc]
        covered += low <= true_mean <= high
    assert covered >= 90


def test_overlap_of_the_largest() -> None:
    first = np.array([9.0, 8.0, 1.0, 2.0])
    assert top_overlap(first, first, share=0.5) == 1
    assert top_overlap(first, -first, share=0.5) == 0
    assert top_overlap(first, np.array([9.0, 0.0, 8.0, 1.0]), share=0.5) == 0.5


def test_the_grid_has_every_variant_beside_a_base_run_of_its_seed() -> None:
    runs = list_runs(quick=False)
    assert len({r.name for r in runs}) == len(runs)
    base = {(r.corpus, r.seed) for r in runs if r.size == r.variant == "base"}
    assert len(base) == 2 * len(SEEDS)
    varied = [r for r in runs if r.variant != "base"]
    assert len(varied) == len(VARIANTS) * len(SEEDS)
    assert all((r.corpus, r.seed) in base for r in varied)
