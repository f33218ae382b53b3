"""In which order an optimizer got a model's parameters: names for a state that only counts them.

torch numbers the parameters of a state_dict through its groups. Which went into which group is up
to the code that trained; these are the rules that are in use, and one holds only if the sizes of
all groups and every shape agree. Where two agree and say different things, there is no answer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import InputError

_NEWER = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names without weight decay in transformers' Trainer.get_decay_parameter_names since 4.46."""


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    parameter: nn.Parameter
    owner: nn.Module

    @property
    def in_layer_norm(self) -> bool:
        return isinstance(self.owner, nn.LayerNorm)

    @property
    def in_named_norm(self) -> bool:
        return self.in_layer_norm or type(self.owner).__name__.endswith(("RMSNorm", "LayerNorm"))


_RULES: dict[str, Callable[[_Member], object]] = {
    "Trainer since 4.46": lambda each: each.in_layer_norm or _NEWER.search(each.name.lower()),
    "Trainer until 4.45": lambda each: each.in_layer_norm or "bias" in each.name,
    "Trainer until 4.45, RMSNorm": lambda each: each.in_named_norm or "bias" in each.name,
    "by name": lambda each: "bias" in each.name or "LayerNorm.weight" in each.name,
    "matrices decay": lambda each: each.parameter.dim() < 2,
}
"""Rule -> whether a parameter goes to the second group, the one without weight decay."""


def name_parameters(
    model: nn.Module,
    groups: Sequence[Sequence[int]],
    shapes: Mapping[int, torch.Size],
    *,
    path: object,
) -> dict[int, str]:
    """Return number -> name for the numbers of each group of an optimizer's state.

    ``shapes``: of the parameters that have a state. Raises InputError where no rule fits the model,
    or several with different results do.
    """
    members = _members(model)
    trained = [each for each in members if each.parameter.requires_grad]
    total = sum(map(len, groups))
    if total != len(trained):
        raise InputError(
            f"{path} counts {total} parameters and the model ({type(model).__name__}) has "
            f"{len(trained)}: give the model that was trained (--model); where some were frozen "
            "then, or experts saved one by one, the file doesn't say which is which: measure the "
            "model with tierhints collect"
        )
    orders = {"one group": [[each.name for each in trained]]}
    for rule, is_second in _RULES.items():
        second = [each.name for each in trained if is_second(each)]
        first = [each.name for each in trained if each.name not in set(second)]
        orders[rule] = [first, second]
    sizes = [len(group) for group in groups]
    known = {each.name: each.parameter.shape for each in trained}
    fitting: dict[str, dict[int, str]] = {}
    wrong = ""
    for rule, order in orders.items():
        if [len(names) for names in order if names] != [size for size in sizes if size]:
            continue
        numbers = [number for group in groups for number in group]
        named = dict(zip(numbers, (name for names in order for name in names), strict=True))
        other = [number for number, shape in shapes.items() if known[named[number]] != shape]
        if other:
            number = other[0]
            wrong = (
                f"parameter {number} is {tuple(shapes[number])} and {named[number]!r} "
                f"{tuple(known[named[number]])}"
            )
        elif named not in fitting.values():
            fitting[rule] = named
    if len(fitting) > 1:
        first_rule, second_rule = list(fitting)[:2]
        number = next(
            key for key in fitting[first_rule]
            if fitting[first_rule][key] != fitting[second_rule][key]
        )  # fmt: skip
        raise InputError(
            f"{path} is ambiguous: its parameter {number} may be "
            f"{fitting[first_rule][number]!r} ({first_rule}) or {fitting[second_rule][number]!r} "
            f"({second_rule}), of one shape: save the optimizer with named parameters, or measure "
            "the model with tierhints collect"
        )
    if not fitting:
        reason = wrong or f"it has groups of {' and '.join(map(str, sizes))} parameters"
        raise InputError(
            f"{path} is not the state of this model ({type(model).__name__}), or was made with "
            f"groups that are not known ({reason}): give the model that was trained (--model), or "
            "save the optimizer with named parameters"
        )
    return next(iter(fitting.values()))


def _members(model: nn.Module) -> list[_Member]:
    members = []
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        members.append(_Member(name, parameter, owner))
    return members
