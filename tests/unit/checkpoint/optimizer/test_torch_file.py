"""Optimizer states in one file: what the numbers in it mean, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from saved_states import save_named, save_trainer, train
from torch import nn

from lib.blocks import unique_parameters
from lib.checkpoint.optimizer import open_optimizer
from lib.errors import InputError
from lib.signals.optimizers import corrected_moments


class RootMeanSquareNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


RootMeanSquareNorm.__name__ = "ToyRMSNorm"


class Toy(nn.Module):
    """Two norms whose names a rule does and doesn't know, with a matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.input_layernorm = RootMeanSquareNorm()
        self.scale = RootMeanSquareNorm()
        self.last = nn.Linear(4, 3, bias=False)


def stepped(model: nn.Module, groups: Any, cls: Any = torch.optim.AdamW, **options: Any) -> Any:
    optimizer = cls(groups, lr=0.1, **options)
    torch.manual_seed(0)
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def groups_of(model: nn.Module, second: set[str]) -> list[dict[str, Any]]:
    parameters = unique_parameters(model)
    return [
        {"params": [each for name, each in parameters.items() if name not in second]},
        {"params": [each for name, each in parameters.items() if name in second]},
    ]


NEWER = {"first.bias", "input_layernorm.weight"}
OLDER = {"first.bias"}
OLDER_RMS = {"first.bias", "input_layernorm.weight", "scale.weight"}


@pytest.mark.parametrize("second", [NEWER, OLDER, OLDER_RMS, set()], ids=len)
def test_each_generation_of_the_trainers_groups(second: set[str], tmp_path: Path) -> None:
    model = Toy()
    optimizer = stepped(model, groups_of(model, second))
    found = open_optimizer(save_trainer(tmp_path, model, optimizer)).moments(Toy())
    expected = dict(corrected_moments(optimizer, model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].corrected(), expected[name]) for name in expected)


def test_groups_that_two_rules_explain_are_refused(tmp_path: Path) -> None:
    class Both(nn.Module):
        """The newer rule lets my_norm go without decay, the one before it the other."""

        def __init__(self) -> None:
            super().__init__()
            self.my_norm = nn.Embedding(4, 4)
            self.other = RootMeanSquareNorm()
            self.other.weight = nn.Parameter(torch.ones(4, 4))

    model = Both()
    optimizer = stepped(model, groups_of(model, {"my_norm.weight"}))
    path = save_trainer(tmp_path, model, optimizer)
    with pytest.raises(InputError, match=r"ambiguous: its parameter 0 may be 'other.weight'.*or"):
        open_optimizer(path).moments(model)
    named = save_named(tmp_path, model, optimizer)
    assert open_optimizer(named).moments(model).keys() == {"my_norm.weight", "other.weight"}


def test_frozen_parameters_are_said_to_be_the_reason(tmp_path: Path) -> None:
    model = Toy()
    model.first.requires_grad_(False)
    rest = [each for each in model.parameters() if each.requires_grad]
    path = save_trainer(tmp_path, model, stepped(model, rest))
    with pytest.raises(InputError, match="counts 3 parameters and the model .* has 5.*frozen"):
        open_optimizer(path).moments(Toy())
    found = open_optimizer(path).moments(model)
    assert found.keys() == {"input_layernorm.weight", "scale.weight", "last.weight"}


def test_unknown_groups_are_refused(tmp_path: Path) -> None:
    model = Toy()
    path = save_trainer(tmp_path, model, stepped(model, groups_of(model, {"last.weight"} | NEWER)))
    with pytest.raises(InputError, match="not the state of this model .* or was made with groups"):
        open_optimizer(path).moments(model)
    one_each = [{"params": [each]} for each in model.parameters()]
    path = save_trainer(tmp_path, model, stepped(model, one_each))
    with pytest.raises(InputError, match="groups of 1 and 1 and 1 and 1 and 1 parameters"):
        open_optimizer(path).moments(model)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model, optimizer = train("gpt2")
    found = open_optimizer(save_trainer(tmp_path, model, optimizer)).moments(model)
    assert "transformer.wte.weight" in found and "lm_head.weight" not in found


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, "keeps momentum_buffer .* as SGD and Muon do"),
    "RMSprop": (torch.optim.RMSprop, {}, "RMSprop or Adadelta keeps a mean square that is not"),
    "Adagrad": (torch.optim.Adagrad, {}, "as Adagrad does, and no second moment"),
    "Adamax": (torch.optim.Adamax, {}, "Adamax keeps a decayed maximum"),
}
KEYS = {
    "bitsandbytes": ({"state1", "state2", "qmap1"}, "bitsandbytes keeps its moments quantized"),
    "Adafactor": ({"exp_avg_sq_row", "exp_avg_sq_col"}, "Adafactor or CAME keeps only row and"),
    "Lion": ({"exp_avg"}, "as Lion does, and no second moment"),
    "Muon": ({"momentum_buffer"}, "as SGD and Muon do, and no second moment"),
    "SOAP": ({"exp_avg", "exp_avg_sq", "GG", "Q"}, "SOAP or Shampoo keeps a preconditioner"),
}


@pytest.mark.parametrize(("cls", "options", "message"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_without_a_second_moment_are_refused(
    cls: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = Toy()
    path = save_trainer(tmp_path, model, stepped(model, model.parameters(), cls, **options))
    with pytest.raises(InputError, match=message):
        open_optimizer(path)


@pytest.mark.parametrize(("keys", "message"), KEYS.values(), ids=KEYS)
def test_optimizers_are_refused_by_what_they_keep(
    keys: set[str], message: str, tmp_path: Path
) -> None:
    state = {"step": 3, **{key: torch.ones(2) for key in keys}}
    document = {"state": {0: state}, "param_groups": [{"params": [0], "betas": (0.9, 0.95)}]}
    torch.save(document, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=message):
        open_optimizer(tmp_path)


def nested(depth: int = 8) -> Any:
    """A tuple that a pickle of some bytes holds, and whose text has 8^depth parts."""
    value: Any = ("a",) * 8
    for _ in range(depth):
        value = (value,) * 8
    return value


SPOILED: dict[str, tuple[str, Any, str]] = {
    "meta": ("exp_avg_sq", lambda m: m.to("meta"), "on meta, not plain"),
    "csr": ("exp_avg_sq", lambda m: m.to_sparse_csr(), "sparse_csr"),
    "float8": ("exp_avg_sq", lambda m: m.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "nested": ("exp_avg_sq", lambda m: torch.nested.nested_tensor([m]), "not plain"),
    "number": ("exp_avg_sq", lambda m: 5, "is int, not plain"),
    "half a step": ("step", lambda _: 2.7, "at step 2.7, not a whole number"),
    "a huge step": ("step", lambda _: 1e300, "not a whole number from 1 to"),
    "an endless step": ("step", lambda _: 10**400, "keeps no step"),
    "a text": ("step", lambda _: "7", "keeps no step"),
    "a truth": ("step", lambda _: True, "keeps no step"),
    "a step on meta": ("step", lambda s: s.to("meta"), "keeps no step|damaged"),
    "no step yet": ("step", lambda _: 0, "at step 0"),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse CSR)")
@pytest.mark.parametrize(("key", "change", "message"), SPOILED.values(), ids=SPOILED)
def test_what_is_no_moment_or_step_is_refused(
    key: str, change: Any, message: str, tmp_path: Path
) -> None:
    model, optimizer = train("gpt2")
    document = optimizer.state_dict()
    document["state"][0][key] = change(document["state"][0][key])
    torch.save(document, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=message):
        open_optimizer(tmp_path).moments(model)


@pytest.mark.parametrize(
    "group",
    [{"betas": (0.9, torch.tensor(0.9, device="meta"))}, {"betas": (0.9, nested())},
     {"betas": "09"}, {"amsgrad": torch.ones(3)}, {"params": None}],
    ids=["meta", "nested", "text", "amsgrad", "params"],
)  # fmt: skip
def test_damaged_groups_are_refused_soon(group: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = train("gpt2")
    document = optimizer.state_dict()
    document["param_groups"][0] |= group
    torch.save(document, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="betas|damaged|no torch optimizer's state_dict"):
        open_optimizer(tmp_path).moments(model)


def test_names_must_be_those_of_the_parameters(tmp_path: Path) -> None:
    model, optimizer = train("gpt2")
    path = save_named(tmp_path, model, optimizer)

    def spoil(change: Any) -> None:
        document = torch.load(path)
        change(document["optimizer"]["param_groups"])
        torch.save(document, tmp_path / "other.pt")

    def twice(groups: Any) -> None:
        groups[1]["param_names"][2] = groups[1]["param_names"][0]

    for change, message in (
        (twice, "twice in param_names"),
        (lambda groups: groups[0].__setitem__("param_names", ["x"]), "has 1 names"),
        (lambda groups: groups[0].pop("param_names"), "has 0 names"),
        (lambda groups: groups[0]["params"].__setitem__(1, 0), "in its groups twice"),
    ):
        spoil(change)
        with pytest.raises(InputError, match=message):
            open_optimizer(tmp_path / "other.pt").moments(model)


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    for document in ({"a": 1}, torch.ones(2), [1, 2], {"state": {}, "param_groups": {"a": 1}}):
        torch.save(document, tmp_path / "optimizer.pt")
        with pytest.raises(InputError, match="no torch optimizer's state_dict"):
            open_optimizer(tmp_path)


def test_what_a_moment_needs_is_asked_for(tmp_path: Path) -> None:
    model, optimizer = train("gpt2")
    document = optimizer.state_dict()
    for group in document["param_groups"]:
        del group["betas"]
    torch.save(document, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="doesn't say beta2: give it"):
        open_optimizer(tmp_path).moments(model)
    found = open_optimizer(tmp_path, beta2=0.95).moments(model)
    assert {moment.beta2 for moment in found.values()} == {0.95}
    save_trainer(tmp_path, model, optimizer)
    with pytest.raises(InputError, match=r"says that beta2 is 0.95, not 0.9:"):
        open_optimizer(tmp_path, beta2=0.9).moments(model)
    del document["state"][3]["step"]
    torch.save(document, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="keeps no step for '3'"):
        open_optimizer(tmp_path, beta2=0.95).moments(model)


def test_coupled_weight_decay_is_told(tmp_path: Path) -> None:
    model = Toy()
    optimizer = stepped(model, model.parameters(), torch.optim.Adam, weight_decay=0.1)
    kind = open_optimizer(save_trainer(tmp_path, model, optimizer)).kind
    assert kind.name == "Adam" and kind.coupled_weight_decay


@pytest.mark.parametrize(
    "name",
    ["optim.safetensors", "rank0-of-8-optimizer.pt", "optimizer_0_rank3.bin", "distrib_optim.pt",
     "optim_000200_rank0.pt"],
)  # fmt: skip
def test_known_formats_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"state {name} is not read: "):
        open_optimizer(tmp_path)


def test_a_folder_without_or_with_two_states_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_optimizer(tmp_path / "none")
    with pytest.raises(InputError, match="no optimizer state that is read here .*it has nothing"):
        open_optimizer(tmp_path)
    with pytest.raises(InputError, match=r"beta2 1.5 must be in \[0, 1\)"):
        open_optimizer(tmp_path, beta2=1.5)
    model, optimizer = train("gpt2")
    save_trainer(tmp_path, model, optimizer)
    (tmp_path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="has several optimizer states: give one"):
        open_optimizer(tmp_path)
