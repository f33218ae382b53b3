"""tier_hints.json: what the file says, how it is made, loaded, checked and matched with a model's
blocks.

The file is intent: for each block its importance, its precision floor where one is known, and the
tier it deserves. It names no device and no bandwidth. No torch here. The flat form
``{"transformer.h.0.attn": "HBM"}`` is read as well.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import parse_json, write_json

SCHEMA_VERSION = 1
SCHEMA_PATH = Path(__file__).with_name("tier_hints.schema.json")


class Tier(StrEnum):
    """A place for weights, nearest to the compute first."""

    HBM = "HBM"
    CPU = "CPU"
    CXL = "CXL"
    PEER = "PEER"
    SSD = "SSD"
    OBJECT = "OBJECT"


class Precision(StrEnum):
    """How a block's weights may be stored, most precise first."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT6 = "int6"
    INT5 = "int5"
    INT4 = "int4"
    INT3 = "int3"
    INT2 = "int2"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockHint:
    """What the file says of one block. A flat file knows the tier alone: the other fields are then
    None or empty.
    """

    tier: Tier
    importance: float | None = None
    rank: int | None = None
    num_bytes: int | None = None
    num_params: int | None = None
    signals: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    reason: str = ""
    kl: Mapping[Precision, float] = field(default_factory=dict)
    floor: Precision | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The identity of the model that the hints were made for."""

    id: str
    revision: str
    class_name: str
    parameter_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """A whole hints file; ``model`` is None for the flat form."""

    blocks: Mapping[str, BlockHint]
    model: ModelInfo | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)


def assign_tiers(
    num_bytes: Mapping[str, int],
    importance: Mapping[str, float | None],
    *,
    hbm_threshold: float,
    cpu_threshold: float,
) -> dict[str, Tier]:
    """Give each block the tier in which the middle of its bytes falls, blocks ordered by
    importance.

    The thresholds are cumulative fractions of all weight bytes: 0.3 and 0.8 give 30 % HBM, 50 % CPU
    and 20 % SSD, as near as whole blocks allow. Equal importance keeps the order of the mapping;
    blocks without a signal (None) come last.
    """
    total = sum(num_bytes.values())
    hbm_end, cpu_end = (
        Fraction(str(threshold)) * total for threshold in (hbm_threshold, cpu_threshold)
    )
    tiers: dict[str, Tier] = {}
    before = 0
    for name in rank_blocks(importance):
        middle = before + Fraction(num_bytes[name], 2)
        tiers[name] = Tier.HBM if middle < hbm_end else Tier.CPU if middle < cpu_end else Tier.SSD
        before += num_bytes[name]
    return {name: tiers[name] for name in num_bytes}


def rank_blocks(importance: Mapping[str, float | None]) -> list[str]:
    """Return block names, most important first; blocks without a signal last, ties in the order
    given.
    """
    return sorted(
        importance,
        key=lambda name: -math.inf if (value := importance[name]) is None else value,
        reverse=True,
    )


def build_hints(
    *,
    model: ModelInfo,
    provenance: Mapping[str, Any],
    num_bytes: Mapping[str, int],
    num_params: Mapping[str, int],
    density: Mapping[str, float | None],
    signals: Mapping[str, Mapping[str, float | Sequence[float]]],
    reasons: Mapping[str, str],
    hbm_threshold: float,
    cpu_threshold: float,
) -> Hints:
    """Make hints from a signal's density: mean signal per weight of each block, on any one scale,
    None where unknown.

    A density and not a sum, so that a block isn't important for being large; it is also the order
    that puts the most Fisher mass into a tier of given bytes (greedy knapsack). ``reasons`` go
    before the reason for the tier.
    """
    known = [value for value in density.values() if value is not None]
    for name, value in density.items():
        if value is not None and not 0 <= value < math.inf:
            raise InputError(
                f"block {name!r}: signal {value} must be finite and not negative: the training run "
                "diverged or is corrupt"
            )
    if not known:
        raise InputError(
            "no block has a signal: every parameter is frozen; collect Fisher information instead"
        )
    largest = max(known) or 1.0
    importance = {
        name: None if value is None else value / largest for name, value in density.items()
    }
    tiers = assign_tiers(
        num_bytes, importance, hbm_threshold=hbm_threshold, cpu_threshold=cpu_threshold
    )
    ranks = {name: rank for rank, name in enumerate(rank_blocks(importance), start=1)}
    blocks = {}
    for name, value in importance.items():
        place = (
            f"rank {ranks[name]} of {len(ranks)} by signal per weight"
            if value is not None
            else "ranked last: no signal"
        )
        blocks[name] = BlockHint(
            tier=tiers[name],
            importance=value,
            rank=None if value is None else ranks[name],
            num_bytes=num_bytes[name],
            num_params=num_params[name],
            signals=dict(signals.get(name, {})),
            reason="; ".join(filter(None, (reasons.get(name), f"{place} -> {tiers[name]}"))),
        )
    thresholds = {"hbm": hbm_threshold, "cpu": cpu_threshold}
    return Hints(model=model, provenance={**provenance, "thresholds": thresholds}, blocks=blocks)


def load_hints(path: str | Path) -> Hints:
    """Read and check a hints file of either form; raises InputError with the file, the place in it
    and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"hints file {path} does not exist: train with TIERING_GENERATE_JSON=y, or make it "
            "with collect_fisher.py"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"hints file {path} can't be read: {error}") from error
    try:
        return hints_from_json(parse_json(text))
    except InputError as error:
        raise InputError(f"hints file {path}: {error}") from error


def hints_from_json(document: Any) -> Hints:
    """Check a parsed document of either form and return it as Hints; raises InputError."""
    if not isinstance(document, dict) or not document:
        raise InputError(
            "expected an object with a 'blocks' entry, or a flat {block: tier} map that isn't empty"
        )
    if "schema_version" not in document and not isinstance(document.get("blocks"), dict):
        return _flat_hints(document)
    for place, value in _numbers(document, ()):
        if not math.isfinite(value):
            raise InputError(f"{'.'.join(place)} is {value}: every number must be finite")
    _check_schema(document)
    model = document["model"]
    return Hints(
        model=ModelInfo(
            id=model["id"],
            revision=model["revision"],
            class_name=model["class"],
            parameter_digest=model["parameter_digest"],
        ),
        provenance=document["provenance"],
        quality=document.get("quality", {}),
        blocks={
            name: BlockHint(
                tier=Tier(entry["tier"]),
                importance=entry["importance"],
                rank=entry["rank"],
                num_bytes=entry["bytes"],
                num_params=entry["params"],
                signals=entry["signals"],
                reason=entry["reason"],
                kl={Precision(key): value for key, value in entry.get("kl", {}).items()},
                floor=Precision(entry["floor"]) if "floor" in entry else None,
            )
            for name, entry in document["blocks"].items()
        },
    )


def hints_to_json(hints: Hints) -> dict[str, Any]:
    """Return the document that ``save_hints`` writes. Flat hints have no full form: InputError."""
    if hints.model is None:
        raise InputError(
            "flat hints name no model and no importance: they can't be saved in the full form"
        )
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "id": hints.model.id,
            "revision": hints.model.revision,
            "class": hints.model.class_name,
            "parameter_digest": hints.model.parameter_digest,
        },
        "provenance": dict(hints.provenance),
    }
    if hints.quality:
        document["quality"] = dict(hints.quality)
    document["blocks"] = {name: _block_to_json(hint) for name, hint in hints.blocks.items()}
    return document


def save_hints(hints: Hints, path: str | Path) -> None:
    """Check against the schema and write atomically; raises InputError (nothing is written then) or
    OSError.
    """
    document = hints_to_json(hints)
    hints_from_json(document)
    write_json(document, path)


def match_hints(
    hints: Hints,
    block_names: Sequence[str],
    *,
    parameter_digest: str | None,
    tied: Mapping[str, str] | None = None,
) -> dict[str, BlockHint]:
    """Return block name -> hint for every block of a model; a hint's name matches a block by FQN
    prefix, the longest wins.

    ``parameter_digest`` None skips the identity check. ``tied``: module -> the block whose weights
    it shares (GPT-2's lm_head); a hint may name it too, if the tiers agree. Raises InputError for
    hints of another model, a block without a hint, and a hint that matches no block.
    """
    if (
        hints.model is not None
        and parameter_digest is not None
        and hints.model.parameter_digest != parameter_digest
    ):
        raise InputError(
            f"the hints were made for other weights (model {hints.model.id!r}, revision "
            f"{hints.model.revision!r}, "
            f"digest {hints.model.parameter_digest[:19]}..., this model has "
            f"{parameter_digest[:19]}...): make hints for this model"
        )
    used: set[str] = set()
    matched: dict[str, BlockHint] = {}
    missing: list[str] = []
    for block in block_names:
        prefix = block
        while prefix and prefix not in hints.blocks:
            prefix = prefix.rpartition(".")[0]
        if prefix:
            used.add(prefix)
            matched[block] = hints.blocks[prefix]
        else:
            missing.append(block)
    for name, block in (tied or {}).items():
        if name in hints.blocks and name not in used and block in matched:
            used.add(name)
            if hints.blocks[name].tier != matched[block].tier:
                raise InputError(
                    f"hint {name!r} says {hints.blocks[name].tier}, but its weights are those of "
                    f"{block!r}, which is in {matched[block].tier}: give both the same tier"
                )
    unmatched = [name for name in hints.blocks if name not in used]
    if unmatched:
        name = unmatched[0]
        parent = next((block for block in block_names if name.startswith(f"{block}.")), None)
        fix = (
            f"it is a part of block {parent!r}: hint the block"
            if parent
            else f"the model's blocks are {_some(list(block_names))}"
        )
        raise InputError(
            f"hint {name!r} ({len(unmatched)} such) matches no block of the model: {fix}"
        )
    if missing:
        raise InputError(
            f"{len(missing)} blocks of the model have no hint ({_some(missing)}): give each a tier"
        )
    return matched


def _flat_hints(document: dict[str, Any]) -> Hints:
    blocks = {}
    for name, tier in document.items():
        if tier not in list(Tier):
            raise InputError(f"block {name!r}: unknown tier {tier!r}; allowed: {', '.join(Tier)}")
        blocks[name] = BlockHint(tier=Tier(tier))
    warnings.warn(
        "flat hints have no precision floors and no model identity: nothing can be checked against "
        "them",
        stacklevel=3,
    )
    return Hints(blocks=blocks)


def _block_to_json(hint: BlockHint) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "tier": str(hint.tier),
        "importance": hint.importance,
        "rank": hint.rank,
        "bytes": hint.num_bytes,
        "params": hint.num_params,
        "signals": dict(hint.signals),
    }
    if hint.kl:
        entry["kl"] = {str(precision): value for precision, value in hint.kl.items()}
    if hint.floor is not None:
        entry["floor"] = str(hint.floor)
    return {**entry, "reason": hint.reason}


def _check_schema(document: dict[str, Any]) -> None:
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(document))
    if error is None:
        return
    place = ".".join(str(step) for step in error.absolute_path) or "the document"
    allowed = (
        f"; allowed: {', '.join(map(str, error.validator_value))}"
        if error.validator == "enum"
        else ""
    )
    raise InputError(
        f"{place}: "
        f"{error.message if not allowed else repr(error.instance) + ' is unknown'}{allowed}"
    )


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(SCHEMA_PATH.read_text(encoding="utf-8")))


def _numbers(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _numbers(child, (*place, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _numbers(child, (*place, str(index)))
    elif isinstance(value, float):
        yield place, value


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
