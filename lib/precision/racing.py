"""Which of many choices costs most beyond its prediction, measured no further than that takes.

A safety factor is the largest ratio of measured to predicted KL among random draws (``tolerance``),
so only the choice that has it needs an exact measurement. In a *race* all choices are measured on a
few sequences of text, and those whose ratio may still be the largest on more and more of them,
until the largest upper limit belongs to a choice that was measured on all. That limit, then the
exact ratio of its choice, is the factor; it is at least every other choice's upper limit.

Why the tolerance limit holds: without a race it fails if no draw's true ratio lies in the upper 5 %
of what they were drawn from, which has the probability 0.95^n. In a race it also fails if the draw
with the largest true ratio was taken for less than it has, which one limit at confidence 1 - risk
rules out: whatever the others' limits do can only raise the factor. So the confidence is
1 - 0.95^n - risk, and no limit needs to hold for all choices at once. ``risk`` is shared out over
the rounds in which limits are looked at.

What makes a sequence hard for one choice makes it hard for all, so a choice's ratio is estimated
against those measured on most sequences, a few *references* drawn at random and the leaders: with y
its KL over its prediction and x their mean, scaled to 1 on all their sequences, r = sum y / sum x
over the sequences that it has seen (the ratio estimator: Cochran 1977, Sampling Techniques, ch. 6).
Its standard error is that of the residuals y - r x, with the correction for drawing from the N
sequences without replacement. Few sequences say little about their own spread, so relative
variances are moderated with all choices' (Smyth 2004, doi:10.2202/1544-6115.1027), and the limit is
r (1 + t s) with t Student's quantile. That supposes residuals near a normal distribution, as means
over hundreds of positions are: a choice of which they aren't (a standard error above
``_LARGEST_ERROR``) goes on whatever its limit says. The tests simulate log-normal and gamma
distributed ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

RISK = 0.01
"""Probability that the choice with the largest ratio is taken for less than it has."""
REFERENCES = 4
"""Choices measured on every sequence, for the others to be compared with."""
FIRST = 4
"""Sequences that every choice is measured on where the caller doesn't know better."""
_LARGEST_ERROR = 0.125
"""Relative standard error above which a ratio isn't near enough to normal for its limit to count:
such a choice goes on whatever its limit says."""
_LARGEST_DOF = 12.0
"""Degrees of freedom that other choices' spread may add: more can't be told from so few."""

Measure = Callable[[Sequence[int], int, int], Sequence[Sequence[float]]]
"""(choices, start, end) -> KL of each choice on each of the sequences start to end."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is known of the contenders' ratios, in their order."""

    ratios: Floats
    """Estimates of what all ``sequences`` would give."""
    limits: Floats
    """Upper limits; the ratio itself for a contender that was measured on every sequence."""
    exact: NDArray[np.bool_]
    settled: NDArray[np.bool_]
    """Whether the ratio is known well enough for its limit to count."""

    @property
    def leader(self) -> int:
        """The contender with the largest limit."""
        return int(np.argmax(self.limits))


class Race:
    """KL of choices on a text of ``total`` sequences in random order, measured as far as needed."""

    def __init__(self, measure: Measure, *, count: int, total: int, first: int = FIRST) -> None:
        self._measure = measure
        self.total = total
        self._first = min(first, total)
        self.kl: list[list[float]] = [[] for _ in range(count)]
        """Per choice the KL on each of the sequences that it was measured on."""

    def begin(self, choices: Sequence[int]) -> None:
        """Measure choices on the first sequences; those that these don't change at all, on as many
        more as it takes.
        """
        self._extend(choices, self._first)
        length = self._first
        while length < self.total:
            length = min(2 * length, self.total)
            self._extend([i for i in choices if sum(self.kl[i]) <= 0], length)

    def finish(self, choices: Sequence[int]) -> None:
        """Measure choices on every sequence."""
        self._extend(choices, self.total)

    def run(
        self,
        contenders: Sequence[int],
        predicted: Sequence[float],
        *,
        references: Sequence[int],
        risk: float = RISK,
    ) -> Standing:
        """Measure until the largest limit belongs to a contender that has seen every sequence.

        ``predicted``: what each contender's KL is divided by. All must have begun. ``references``:
        choices drawn at random, contenders or not, which are measured on every sequence.
        """
        self.finish(references)
        rounds = max(1, math.ceil(math.log2(self.total / self._first)))
        while True:
            standing = self._stand(contenders, predicted, risk=risk / rounds)
            if standing.exact[standing.leader] and standing.settled.all():
                return standing
            largest = standing.ratios[np.isfinite(standing.ratios)].max()
            hopeful = (standing.limits >= largest) | ~standing.settled
            rivals = [
                i
                for i, hope, exact in zip(contenders, hopeful, standing.exact, strict=True)
                if hope and not exact
            ]
            shortest = min(len(self.kl[i]) for i in rivals)
            self._extend(rivals, min(2 * shortest, self.total))

    def means(self) -> list[float]:
        """Return each choice's mean KL, of those with few sequences corrected by what those with
        most have on these and on all of theirs.
        """
        course = self._course()
        found = []
        for kl in self.kl:
            seen = math.fsum(course[: len(kl)])
            if len(kl) >= len(course) or seen <= 0:
                seen = len(kl)
            found.append(math.fsum(kl) / seen if kl else 0.0)
        return found

    def _extend(self, choices: Sequence[int], end: int) -> None:
        for start in sorted({len(self.kl[i]) for i in choices}):
            if start < end:
                group = [i for i in choices if len(self.kl[i]) == start]
                for i, values in zip(group, self._measure(group, start, end), strict=True):
                    self.kl[i] += values

    def _course(self) -> Floats:
        """Return the KL of those with most sequences on each of these, relative to its mean."""
        most = max(map(len, self.kl))
        rows = [np.array(kl) for kl in self.kl if len(kl) == most]
        changed = [row / row.mean() for row in rows if row.sum() > 0]
        course: Floats = np.mean(changed or [np.ones(most)], axis=0)
        return course

    def _stand(
        self, contenders: Sequence[int], predicted: Sequence[float], *, risk: float
    ) -> Standing:
        course = self._course()
        ratios, spreads, counts = [], [], []
        for i, expected in zip(contenders, predicted, strict=True):
            values = np.array(self.kl[i]) / expected
            seen = course[: len(values)]
            ratio = spread = math.inf  # a course without a change on these sequences says nothing
            if values.sum() <= 0:
                ratio = spread = 0.0
            elif seen.sum() > 0:
                ratio = values.sum() / seen.sum()
                squares = ((values - ratio * seen) ** 2).sum()
                spread = squares / max(len(values) - 1, 1) / values.mean() ** 2
            ratios.append(ratio)
            spreads.append(spread)
            counts.append(len(values))
        n = np.array(counts)
        spread_2, dof = moderate(np.array(spreads), n - 1)
        error = np.sqrt(spread_2 / n * (1 - n / self.total))
        return Standing(
            ratios=np.array(ratios),
            limits=np.array(ratios) * (1 + student_quantile(1 - risk, dof) * error),
            exact=n == self.total,
            settled=(n == self.total) | (error <= _LARGEST_ERROR),
        )


def moderate(variances: Floats, dof: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return variances drawn towards what they have in common, and their degrees of freedom.

    The common variance and its weight d0 are fitted to the logarithms' mean and spread (Smyth 2004,
    section 6.2). Variances of no degree of freedom are the common one.
    """
    known = (dof > 0) & (variances > 0) & np.isfinite(variances)
    if not known.any():
        return variances, np.full(len(variances), 1.0)
    half = torch.from_numpy(dof[known] / 2)
    digamma, trigamma = torch.digamma(half).numpy(), torch.polygamma(1, half).numpy()
    centred = np.log(variances[known]) - digamma + np.log(dof[known] / 2)
    excess = float(np.var(centred, ddof=1) - trigamma.mean()) if len(centred) > 1 else 0.0
    weight = min(2 * _inverse_trigamma(excess), _LARGEST_DOF) if excess > 0 else _LARGEST_DOF
    digamma_0 = float(torch.digamma(torch.tensor(weight / 2, dtype=torch.float64)))
    common = math.exp(float(centred.mean()) + digamma_0 - math.log(weight / 2))
    total = (weight + dof).astype(np.float64)
    return (weight * common + dof * variances) / total, total


def student_quantile(probability: float, dof: Floats) -> Floats:
    """Return Student's quantiles of a probability from 0.5 on, within 1 % up to 0.999 for 5 or more
    degrees of freedom, and too small for fewer (Abramowitz & Stegun 1964, 26.7.5).
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    steps = [term / dof ** (power + 1) for power, term in enumerate(terms)]
    quantiles: Floats = np.full(len(dof), z) + np.sum(steps, axis=0)
    return quantiles


def _inverse_trigamma(value: float) -> float:
    """Return x with trigamma(x) = value, by Newton's method on 1 / trigamma (Smyth 2004, appendix),
    which converges from below.
    """
    x = torch.tensor(0.5 + 1 / value, dtype=torch.float64)
    for _ in range(20):
        trigamma = torch.polygamma(1, x)
        step = trigamma * (1 - trigamma / value) / torch.polygamma(2, x)
        x += step
        if -float(step / x) < 1e-8:
            break
    return float(x)
