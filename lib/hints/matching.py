"""Hints matched with the blocks of a model, by name."""

from collections.abc import Callable, Mapping, Sequence

from ..errors import InputError
from .records import BlockHint, Hints

Identify = Callable[[str], str]
"""Returns the digest of a model's weights, in the scheme of the digest that it is given."""


def match_hints(
    hints: Hints,
    block_names: Sequence[str],
    *,
    identify: Identify | None,
    tied: Mapping[str, str] | None = None,
) -> dict[str, BlockHint]:
    """Return block name -> hint for every block of a model; a hint's name matches a block by FQN
    prefix, the longest wins.

    ``identify`` (``partial(parameter_digest, model)``) names the model's weights; None skips the
    identity check. ``tied``: module -> the block whose weights it shares (GPT-2's lm_head); a hint
    may name it too, if the tiers agree. Raises InputError for hints of another model, a block
    without a hint, and a hint that matches no block.
    """
    if hints.model is not None and identify is not None:
        made_for = hints.model.parameter_digest
        found = identify(made_for)
        if found != made_for:
            raise InputError(
                f"the hints were made for other weights (model {hints.model.id!r}, revision "
                f"{hints.model.revision!r}, digest {shorten_digest(made_for)}, this model has "
                f"{shorten_digest(found)}): make hints for this model"
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


def shorten_digest(digest: str) -> str:
    """Return a digest's scheme and its first digits."""
    scheme, _, digits = digest.rpartition(":")
    return f"{scheme}:{digits[:12]}..."


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
