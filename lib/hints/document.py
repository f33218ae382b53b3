"""tier_hints.json: load, check against the schema, save atomically."""

import json
import math
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import parse_json, write_json
from ..vocabulary import Precision, Tier
from .records import BlockHint, Hints, ModelInfo

SCHEMA_VERSION = 1


SCHEMA_PATH = Path(__file__).with_name("tier_hints.schema.json")


def load_hints(path: str | Path) -> Hints:
    """Read and check a hints file of either form; raises InputError with the file, the place in it
    and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"hints file {path} does not exist: make it with tierhints collect, or tierhints "
            "from-checkpoint"
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
    if error.validator == "pattern" and "description" in error.schema:
        allowed = f"; {error.schema['description']}"
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
