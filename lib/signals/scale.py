"""The scale that turns Adam's second moment into a Fisher diagonal per token.

A step whose loss is the mean over B tokens, with gradients clipped by a coefficient c, adds g^2
with

    E[g_i^2] = c^2 (F_ii / B + (E g_i)^2)

to the moment, F per token (Li et al. 2025, "Squisher", arXiv 2507.18807; the (E g)^2 part vanishes
near convergence). The bias-corrected moment is the average of g^2 over the last steps, weighted by
beta2^age. Averaging c^2 and c^2 / B with the *same* weights therefore gives the scale even
where c or B change from step to step:

    F_ii = v_hat_i * tokens_per_update / mean_clip_sq
    tokens_per_update = <c^2> / <c^2 / B>
    mean_clip_sq = <c^2>

One bias remains: larger gradients are clipped more, so that <c^2 g^2> lies below <c^2> <g^2>, by
about the relative variance of the gradient's squared norm; the more weights, the less that varies.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError

MIN_COVERAGE = 0.999
"""Smallest share of the moment's window that must be known for the scale to be given."""


class MomentScale:
    """Averages of c^2 and c^2 / B over the window of Adam's moment, as floats to checkpoint.

    Call ``update`` once per optimizer step. A step of which something is unknown counts as unknown:
    no scale is given until unknown steps have left the window (``MIN_COVERAGE``).
    """

    def __init__(self, beta2: float) -> None:
        if not 0 <= beta2 < 1:
            raise InputError(f"beta2 {beta2} must be in [0, 1)")
        self.beta2 = beta2
        self.steps = 0
        self._known = 0.0
        self._clip_sq = 0.0
        self._clip_sq_per_token = 0.0

    def update(self, *, tokens: float | None, clip_coefficient: float | None) -> None:
        """Add one optimizer step: tokens its loss averaged over all processes, clip coefficient.

        None means unknown. Raises InputError unless tokens > 0 and the coefficient is in (0, 1].
        """
        if tokens is not None and not tokens > 0:
            raise InputError(f"tokens per update {tokens} must be positive")
        if clip_coefficient is not None and not 0 < clip_coefficient <= 1:
            raise InputError(f"clip coefficient {clip_coefficient} must be in (0, 1]")
        known = tokens is not None and clip_coefficient is not None
        clip_sq = clip_coefficient**2 if clip_coefficient is not None and known else 0.0
        per_token = clip_sq / tokens if tokens is not None and known else 0.0
        self.steps += 1
        self._known = self._mix(self._known, float(known))
        self._clip_sq = self._mix(self._clip_sq, clip_sq)
        self._clip_sq_per_token = self._mix(self._clip_sq_per_token, per_token)

    def coverage(self, optimizer_step: int) -> float:
        """Return which share of the moment's window the updates seen here make up."""
        return self._known / (1 - self.beta2**optimizer_step) if optimizer_step > 0 else 0.0

    def values(self, optimizer_step: int) -> tuple[float, float] | None:
        """Return (tokens_per_update, mean_clip_sq), or None if they don't describe the moment.

        None if too much of the window is unknown, or if the optimizer counts fewer steps than were
        seen (moments were reset).
        """
        if optimizer_step < self.steps or self.coverage(optimizer_step) < MIN_COVERAGE:
            return None
        # Seven digits are finer than the estimate, and hide that 8192 came out as 8191.9995.
        tokens, clip_sq = self._clip_sq / self._clip_sq_per_token, self._clip_sq / self._known
        return float(f"{tokens:.7g}"), min(1.0, float(f"{clip_sq:.7g}"))

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must hold; JSON keeps it exactly."""
        return {
            "beta2": self.beta2,
            "steps": self.steps,
            "known": self._known,
            "clip_sq": self._clip_sq,
            "clip_sq_per_token": self._clip_sq_per_token,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "MomentScale":
        """Rebuild from ``state_dict``; raises InputError if it isn't one."""
        try:
            scale = cls(float(state["beta2"]))
            scale.steps = int(state["steps"])
            scale._known = float(state["known"])
            scale._clip_sq = float(state["clip_sq"])
            scale._clip_sq_per_token = float(state["clip_sq_per_token"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the checkpoint's moment scale {dict(state)} is damaged ({error!r}): resume from "
                "another checkpoint"
            ) from error
        return scale

    def _mix(self, average: float, value: float) -> float:
        return self.beta2 * average + (1 - self.beta2) * value
