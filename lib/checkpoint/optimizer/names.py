"""Saved parameter names and a model's: the same ones, wrappers aside, or a known renaming.

A renaming is taken only if it gives every saved moment a parameter of its own, of the same shape.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..packed import packed_layouts
from .interface import SavedMoment

_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renaming:
    """How another code base calls the parameters of a Llama-shaped model of transformers.

    ``rules``: pattern of a whole name -> the model's name. ``interleaved``: whether the rows of
    queries and keys come in pairs for the rotary position, where transformers' come in halves.
    """

    name: str
    rules: tuple[tuple[str, str], ...]
    interleaved: bool = False

    def rename(self, name: str) -> str | None:
        """Return the model's name, None for one without a rule."""
        for pattern, target in self.rules:
            match = re.fullmatch(pattern, name)
            if match:
                return match.expand(target)
        return None


_L = r"layers\.(\d+)\."
_B = r"blocks\.(\d+)\."
_HF = r"model.layers.\1."
_OLMO_CORE = (
    (r"embeddings\.weight", "model.embed_tokens.weight"),
    (_B + r"attention\.w_([qkv])\.(weight|bias)", _HF + r"self_attn.\2_proj.\3"),
    (_B + r"attention\.w_out\.(weight|bias)", _HF + r"self_attn.o_proj.\2"),
    (_B + r"attention\.([qk]_norm)\.weight", _HF + r"self_attn.\2.weight"),
    (_B + r"feed_forward\.w1\.weight", _HF + "mlp.gate_proj.weight"),
    (_B + r"feed_forward\.w3\.weight", _HF + "mlp.up_proj.weight"),
    (_B + r"feed_forward\.w2\.weight", _HF + "mlp.down_proj.weight"),
    (r"lm_head\.norm\.weight", "model.norm.weight"),
    (r"lm_head\.w_out\.weight", "lm_head.weight"),
)  # fmt: skip
RENAMINGS = (
    Renaming(
        name="torchtitan",
        interleaved=True,
        rules=(
            (r"tok_embeddings\.weight", "model.embed_tokens.weight"),
            (_L + r"attention\.(?:qkv_linear\.)?w([qkv])\.(weight|bias)",
             _HF + r"self_attn.\2_proj.\3"),
            (_L + r"attention\.wo\.(weight|bias)", _HF + r"self_attn.o_proj.\2"),
            (_L + r"attention\.([qk]_norm)\.weight", _HF + r"self_attn.\2.weight"),
            (_L + r"feed_forward\.w1\.weight", _HF + "mlp.gate_proj.weight"),
            (_L + r"feed_forward\.w3\.weight", _HF + "mlp.up_proj.weight"),
            (_L + r"feed_forward\.w2\.weight", _HF + "mlp.down_proj.weight"),
            (_L + r"attention_norm\.weight", _HF + "input_layernorm.weight"),
            (_L + r"ffn_norm\.weight", _HF + "post_attention_layernorm.weight"),
            (r"norm\.weight", "model.norm.weight"),
            (r"(?:output|lm_head)\.weight", "lm_head.weight"),
        ),
    ),
    Renaming(
        name="OLMo-core, norms before",
        rules=(
            *_OLMO_CORE,
            (_B + r"attention_norm\.weight", _HF + "input_layernorm.weight"),
            (_B + r"feed_forward_norm\.weight", _HF + "post_attention_layernorm.weight"),
        ),
    ),
    Renaming(
        name="OLMo-core, norms after",
        rules=(
            *_OLMO_CORE,
            (_B + r"attention_norm\.weight", _HF + "post_attention_layernorm.weight"),
            (_B + r"feed_forward_norm\.weight", _HF + "post_feedforward_layernorm.weight"),
        ),
    ),
)  # fmt: skip
"""torchtitan.models.llama3.state_dict_adapter and olmo_core.nn.hf.convert have these tables."""


def match_names(
    model: nn.Module, found: Mapping[str, SavedMoment], *, path: object
) -> dict[str, SavedMoment]:
    """Return canonical parameter name -> moment for moments by saved name.

    Experts that were saved one by one are put together as transformers does with their weights.
    Raises InputError where a saved name or shape isn't the model's.
    """
    problems = []
    for candidate in _candidates(model, found):
        matched, problem = _match(model, candidate)
        if not problem:
            return matched
        problems.append(problem)
    own = [name for name, _ in model.named_parameters()]
    raise InputError(
        f"{path} is not the state of this model ({type(model).__name__}): {problems[0]}; it has "
        f"{_some(found)}, the model has {_some(own)}: give the model that was trained (--model)"
    )


def check_shapes(
    model: nn.Module, moments: Mapping[str, SavedMoment], *, path: object
) -> dict[str, SavedMoment]:
    """Return moments that have the model's own names; InputError for another shape."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, moment in moments.items():
        if moment.shape != shapes[name]:
            raise InputError(
                f"{path}: exp_avg_sq of {name!r} has shape {tuple(moment.shape)} and the parameter "
                f"{tuple(shapes[name])}, so it isn't one value per weight: give the model that was "
                "trained (--model)"
            )
    return dict(moments)


def _candidates(
    model: nn.Module, found: Mapping[str, SavedMoment]
) -> Iterator[dict[str, SavedMoment]]:
    yield dict(found)
    bare = {_WRAPPERS.sub("", name): moment for name, moment in found.items()}
    if len(bare) == len(found):
        yield bare
    for renaming in RENAMINGS:
        names = {name: renaming.rename(name) for name in bare}
        if all(names.values()) and len(set(names.values())) == len(found):
            renamed = {str(names[name]): moment for name, moment in bare.items()}
            if renaming.interleaved:
                renamed = {name: _halve_rotary(model, name, each) for name, each in renamed.items()}
            yield renamed


def _match(
    model: nn.Module, found: Mapping[str, SavedMoment]
) -> tuple[dict[str, SavedMoment], str]:
    """Return the moments by canonical name, and what is wrong with them."""
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources: dict[str, tuple[str, ...]] = {name: (name,) for name in found if name in parameters}
    arranged = {name: found[name] for name in sources}
    left = [name for name in found if name not in parameters]
    if left:
        renamed, stacked = packed_layouts(model, found)
        for target, name in renamed.items():
            arranged[target], sources[target] = found[name], (name,)
        for target, rows in stacked.items():
            stack = _stack([[found[name] for name in row] for row in rows])
            if stack is None:
                return {}, f"the experts of {target!r} don't fit together"
            arranged[target] = stack
            sources[target] = tuple(name for row in rows for name in row)
        used = {name for names in sources.values() for name in names}
        left = [name for name in found if name not in used]
    if left:
        return {}, f"the model has no parameter {left[0]!r}"
    matched: dict[str, SavedMoment] = {}
    for name, moment in arranged.items():
        owner, shape = owners[id(parameters[name])], parameters[name].shape
        if owner in matched:
            return {}, f"it has {name!r} and {owner!r}, which are one weight in the model"
        if moment.shape != shape:
            return {}, f"{name!r} is {tuple(moment.shape)}, in the model {tuple(shape)}"
        matched[owner] = moment
    return matched, ""


def _stack(rows: list[list[SavedMoment]]) -> SavedMoment | None:
    """Put moments together: the parts of each row lie below each other; None if they differ."""
    shapes = {tuple(part.shape for part in row) for row in rows}
    inner = {part.shape[1:] for row in rows for part in row}
    steps = [{part.steps for part in row} for row in rows]
    beta2 = {part.beta2 for row in rows for part in row}
    if len(shapes) != 1 or len(inner) != 1 or len(beta2) != 1 or any(len(s) > 1 for s in steps):
        return None
    seen = tuple(next(iter(each))[0] for each in steps)
    height = sum(part.shape[0] for part in rows[0])

    def read() -> Tensor:
        return torch.stack([torch.cat([part.read() for part in row]) for row in rows])

    return SavedMoment(
        shape=torch.Size((len(rows), height, *rows[0][0].shape[1:])),
        steps=seen[:1] if len(set(seen)) == 1 else seen,
        beta2=beta2.pop(),
        read=read,
    )


def _halve_rotary(model: nn.Module, name: str, moment: SavedMoment) -> SavedMoment:
    """Order the rows of queries and keys as transformers' Llama has them."""
    config: Any = getattr(model, "config", None)
    heads = {
        "q_proj": getattr(config, "num_attention_heads", None),
        "k_proj": getattr(config, "num_key_value_heads", None),
    }.get(name.split(".")[-2])
    if getattr(config, "model_type", None) != "llama" or not heads or moment.shape[0] % (2 * heads):
        return moment
    read: Callable[[], Tensor] = moment.read

    def halved() -> Tensor:
        pairs = read().view(heads, -1, 2, *moment.shape[1:])
        return pairs.transpose(1, 2).reshape(moment.shape)

    return replace(moment, read=halved)


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
