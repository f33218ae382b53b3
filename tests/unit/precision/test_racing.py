"""Races of simulated choices: the factor is that of measuring everything, and covers."""

import numpy as np
import pytest

from lib.precision.racing import Race, moderate, student_quantile
from lib.precision.tolerance import calibrate

SEQUENCES = 64


def simulate(
    random: np.random.Generator, count: int, *, noise: float, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions, and KL per choice and sequence: hard sequences are hard for all, and each
    choice varies around that by an amount of its own.
    """
    predicted = 10 ** random.uniform(-6, -1, count)
    ratio = np.exp(random.normal(0, 0.2, count))
    hardness = np.exp(random.normal(0, 0.3, SEQUENCES))
    spread = noise * np.exp(random.normal(0, 0.3, count))[:, None]
    if kind == "log-normal":
        own = np.exp(spread * random.normal(0, 1, (count, SEQUENCES)) - spread**2 / 2)
    else:
        own = random.gamma(1 / spread**2, spread**2, (count, SEQUENCES))
    return predicted, (predicted * ratio)[:, None] * hardness * own


def run(predicted: np.ndarray, kl: np.ndarray, references: int = 4) -> tuple[float, float, Race]:
    """Return the largest ratio by a race and by measuring everything, and the race."""
    race = Race(
        lambda choices, start, end: kl[list(choices), start:end].tolist(),
        count=len(kl),
        total=kl.shape[1],
    )
    race.begin(range(len(kl)))
    standing = race.run(range(len(kl)), predicted.tolist(), references=range(references))
    return standing.limits.max(), (kl.mean(1) / predicted).max(), race


@pytest.mark.parametrize("kind", ["log-normal", "gamma"])
@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_a_race_finds_the_factor_of_measuring_everything(kind: str, noise: float) -> None:
    random = np.random.default_rng(0)
    same, measured = [], []
    for _ in range(50):
        raced, exact, race = run(*simulate(random, 63, noise=noise, kind=kind))
        same.append(raced == pytest.approx(exact))
        measured.append(sum(map(len, race.kl)))
    assert np.mean(same) >= 0.94  # 0.99, within the noise of 50 trials
    assert np.mean(measured) < 0.3 * 63 * SEQUENCES


def covers(trials: int, seed: int) -> float:
    """Return how often the factor of 63 raced choices covers 95 % of others on the same text."""
    random = np.random.default_rng(seed)
    covered = []
    for _ in range(trials):
        predicted, kl = simulate(random, 63 + 400, noise=0.2, kind="log-normal")
        raced, _, _ = run(predicted[:63], kl[:63])
        others = kl[63:].mean(1) / predicted[63:]
        covered.append((others <= raced).mean() >= 0.95)
    return float(np.mean(covered))


def test_the_factor_covers_new_choices() -> None:
    assert covers(60, seed=0) > 0.87  # 0.95, within the noise of 60 trials


@pytest.mark.slow
def test_the_factor_covers_new_choices_in_ten_thousand_draws() -> None:
    assert covers(10_000, seed=1) > 0.945


def test_what_changes_nothing_at_first_is_measured_further() -> None:
    kl = np.ones((10, 16)) * np.linspace(1, 2, 10)[:, None]
    kl[3, :9] = 0  # an expert that the first sequences don't reach
    kl[4] = 0
    raced, exact, race = run(np.ones(10), kl)
    assert len(race.kl[3]) == len(race.kl[4]) == 16
    assert raced == pytest.approx(exact)


def test_means_are_corrected_for_easy_sequences() -> None:
    hardness = np.array([1.0, 1, 1, 1, 4, 4, 4, 4])
    kl = np.array([1.0, 2, 9])[:, None] * hardness
    _, _, race = run(np.ones(3), kl, references=1)
    assert [len(values) for values in race.kl] == [8, 4, 8]
    assert race.means() == pytest.approx([2.5, 5, 22.5])


def test_a_text_of_few_sequences_is_measured_whole() -> None:
    for total in (1, 2, 3):
        kl = np.random.default_rng(0).uniform(1, 2, (9, total))
        raced, exact, _ = run(np.ones(9), kl)
        assert raced == pytest.approx(exact)


def test_quantiles_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for probability in (0.95, 0.99, 0.998):
        dof = np.array([5.0, 8, 14, 40])
        expected = stats.t.ppf(probability, dof)
        assert student_quantile(probability, dof) == pytest.approx(expected, rel=0.01)


def test_variances_are_moderated_by_what_they_have_in_common() -> None:
    random = np.random.default_rng(0)
    dof = np.full(400, 3)
    alike, weight = moderate(random.chisquare(3, 400) / 3, dof)
    assert np.ptp(alike) < 3 and weight[0] > 10  # they differ by chance alone
    true = 1 / (random.chisquare(4, 400) / 4)
    found, weight = moderate(true * random.chisquare(3, 400) / 3, dof)
    assert weight[0] == pytest.approx(7, abs=2)
    assert np.log(found / true).std() < 0.8 * np.log(random.chisquare(3, 400) / 3).std()


def test_limits_make_the_factor() -> None:
    random = np.random.default_rng(0)
    predicted = 10 ** random.uniform(-6, -1, 84)
    measured = predicted * np.exp(random.normal(0, 0.2, 84))
    plain = calibrate(predicted.tolist(), measured.tolist())
    raced = calibrate(predicted.tolist(), measured.tolist(), limits=(1.1 * measured).tolist())
    assert raced.scale == plain.scale and raced.band == plain.band
    assert raced.conformal_factor == pytest.approx(1.1 * plain.conformal_factor)
    assert raced.confidence == 0.95
