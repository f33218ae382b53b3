"""What a calibration of requests found, and the file that keeps it.

A factor is valid for the requests that the scores came from: for this model, codec, ladder,
workload and policy (how a tier is chosen, and tokens). The ladder is in the file, the others have a
digest there, and a file of others isn't loaded. No torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..errors import InputError
from ..files import parse_json, write_json
from ..precision.binomial import covering_rank, least_count
from .bounds import RequestError
from .ladder import Ladder

CONFIDENCE = 0.95
"""That a factor covers what it says, given the requests that were drawn."""
KEYS = ("model", "codec", "workload", "policy")
"""What a calibration is of, beside its ladder."""
FORMAT = "tierhints calibration of requests 1"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Scores of calibration requests. Raises InputError for what can't be one."""

    keys: Mapping[str, str]
    """A digest, or what says as much, of each of ``KEYS``."""
    ladder: Ladder
    """Whose tiers the answers were measured at."""
    information: tuple[tuple[float, float], ...]
    """Mean Fisher information of a cached number, of each layer's keys and values."""
    scores: tuple[float, ...]
    """Of each request the largest ratio, over the tiers, of measured to predicted nats."""
    tokens: tuple[int, ...]
    """Of each request: those of its prompt."""

    def __post_init__(self) -> None:
        if set(self.keys) != set(KEYS):
            raise InputError(f"a calibration is of {', '.join(KEYS)}, not {', '.join(self.keys)}")
        if not self.scores or len(self.scores) != len(self.tokens):
            raise InputError(
                f"{len(self.scores)} scores of {len(self.tokens)} requests: give one of each"
            )
        numbers = [*self.scores, *(each for pair in self.information for each in pair)]
        if not all(number >= 0 and math.isfinite(number) for number in numbers):
            raise InputError("a score or an information isn't a finite number of 0 or more")

    def check_covers(self, ladder: Ladder) -> None:
        """Raise InputError for a ladder with a tier that nothing was measured at."""
        for tier in ladder.tiers:
            if tier not in self.ladder.tiers:
                raise InputError(
                    f"tier {tier.name} isn't as the calibration has measured it: serve with the "
                    f"calibration's own tiers, some or all of {', '.join(self.ladder.names)}"
                )

    def factor(self, delta: float) -> float:
        """Return c: at most a share ``delta`` of like requests has a larger score, with 95 %
        confidence.

        Raises RequestError, saying the least number, for fewer requests than that takes.
        """
        if not 0 < delta < 1:
            raise RequestError(
                f"quality_bound.delta is {delta}: a calibrated bound has one above 0 and below 1",
                param="quality_bound",
            )
        rank = covering_rank(len(self.scores), 1 - delta, CONFIDENCE)
        if rank is None:
            raise RequestError(
                f"quality_bound.delta is {delta}, which takes {least_count(1 - delta, CONFIDENCE)} "
                f"calibration requests, and there were {len(self.scores)}: give a larger delta, or "
                "calibrate on more",
                param="quality_bound",
                code="calibration_too_small",
            )
        return sorted(self.scores)[rank - 1]

    @property
    def digest(self) -> str:
        """What tells it from any other."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self._to_document(), sort_keys=True).encode())

    def save(self, path: str | Path) -> None:
        """Write a JSON file, at once or not at all."""
        write_json(self._to_document(), path)

    def _to_document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "keys": dict(self.keys),
            "ladder": self.ladder.to_dict(),
            "information": [list(pair) for pair in self.information],
            "scores": list(self.scores),
            "tokens": list(self.tokens),
        }


def load_calibration(path: str | Path, expected: Mapping[str, str]) -> Calibration:
    """Read a calibration of what ``expected`` says, some or all of ``KEYS``.

    Raises InputError for a file that isn't one, and for one of something else, naming what differs.
    """
    try:
        document = parse_json(Path(path).read_text("utf-8"))
        if document["format"] != FORMAT:
            raise InputError(f"its format is {document['format']!r}, not {FORMAT!r}")
        calibration = _from_document(document)
    except OSError as error:
        raise InputError(f"calibration {path} can't be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no calibration of requests: {error}; make it anew") from error
    differing = [
        f"{key} ({calibration.keys[key]} there, {value} here)"
        for key, value in expected.items()
        if calibration.keys[key] != value
    ]
    if differing:
        raise InputError(
            f"calibration {path} is of another {', another '.join(differing)}: make one for this"
        )
    return calibration


def score_request(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Return the largest ratio of measured to predicted nats per token over the tiers below full.

    A KL that rounding has made negative is 0. Raises InputError for what has no ratio: predicted
    nats of 0, from a prompt without pages, or anything that isn't finite.
    """
    if not measured or len(measured) != len(predicted):
        raise InputError(
            f"{len(measured)} measured and {len(predicted)} predicted: give one per tier below full"
        )
    for true, guess in zip(measured, predicted, strict=True):
        if not (math.isfinite(true) and math.isfinite(guess) and guess > 0):
            raise InputError(
                f"measured {true} and predicted {guess} nats per token have no ratio: give prompts "
                "long enough for a compact page, and finite measurements"
            )
    return max(max(true, 0.0) / guess for true, guess in zip(measured, predicted, strict=True))


def _from_document(document: Mapping[str, Any]) -> Calibration:
    return Calibration(
        keys={str(key): str(value) for key, value in document["keys"].items()},
        ladder=Ladder.from_dict(document["ladder"]),
        information=tuple((float(keys), float(values)) for keys, values in document["information"]),
        scores=tuple(map(float, document["scores"])),
        tokens=tuple(map(int, document["tokens"])),
    )
