"""Which optimizers are read, and what those that are refused are told."""

from typing import Any

import pytest
import torch
from signal_models import toy_lm, train
from torch import Tensor, nn

from lib.errors import InputError
from lib.signals import AdamSignal, adam_hints, collect_adam_signal


class Foreign(torch.optim.AdamW):
    """An optimizer of another library that keeps exp_avg_sq elementwise."""


def stepped(cls: type[torch.optim.Optimizer], **options: Any) -> tuple[nn.Module, Any]:
    model = toy_lm()
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    return model, optimizer


def alter_state(optimizer: torch.optim.Optimizer, **entries: Any) -> None:
    for state in optimizer.state.values():
        state.update(entries)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (torch.optim.SGD, "no second moment"),
        (torch.optim.Adafactor, "factored"),
        (torch.optim.Adamax, "maximum"),
        (torch.optim.RMSprop, "not bias-corrected"),
        (torch.optim.Adadelta, "not bias-corrected"),
        (torch.optim.Adagrad, "sums squared"),
        (torch.optim.SparseAdam, "rows touched"),
        (torch.optim.Rprop, "no second moment"),
        (torch.optim.ASGD, "no second moment"),
        (torch.optim.LBFGS, "no second moment"),
    ],
)
def test_torch_optimizers_without_a_moment_are_refused_by_name(
    cls: type[torch.optim.Optimizer], reason: str
) -> None:
    model = toy_lm()
    optimizer = cls(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=f"optimizer {cls.__name__} .*{reason}.*tierhints collect"):
        collect_adam_signal(optimizer, model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Lion", "no second moment"),
        ("AdamW8bit", "quantized"),
        ("PagedAdam8bit", "quantized"),
        ("AdamWFp8", "quantized"),
        ("_AdamW4bit", "quantized"),
        ("SOAP", "rotated basis"),
        ("DistributedShampoo", "rotated basis"),
        ("SingleDeviceMuonWithAuxAdam", "orthogonalises"),
        ("GaLoreAdamW", "projected"),
        ("CAME", "factored"),
        ("DeepSpeedZeroOptimizer", "over the ranks"),
    ],
)
def test_other_libraries_optimizers_are_refused_by_name(name: str, reason: str) -> None:
    model = toy_lm()
    optimizer = type(name, (torch.optim.AdamW,), {})(model.parameters())
    train(model, optimizer)
    with pytest.raises(InputError, match=f"optimizer {name} .*{reason}"):
        collect_adam_signal(optimizer, model)


def test_all_of_bitsandbytes_is_refused() -> None:
    model = toy_lm()
    cls = type("AdamW", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim.adamw"})
    with pytest.raises(InputError, match="bitsandbytes .*quantized"):
        collect_adam_signal(cls(model.parameters()), model)


def test_a_foreign_adam_is_read_with_a_warning_and_recorded() -> None:
    model, optimizer = stepped(Foreign)
    with pytest.warns(UserWarning, match="Foreign isn't torch's Adam"):
        hints = adam_hints(
            optimizer,
            model,
            model_id="toy",
            hbm_threshold=0.3,
            cpu_threshold=0.8,
            tokens_per_update=12,
            clip=0,
        )
    assert hints.provenance["foreign_optimizer"] is True
    assert "isn't torch's Adam" in hints.provenance["fisher_trace"]
    assert all("fisher_trace" not in hint.signals for hint in hints.blocks.values())
    assert all("adam_exp_avg_sq" in hint.signals for hint in hints.blocks.values())


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.filterwarnings("error")
def test_torchs_adam_family_is_read(cls: type[torch.optim.Optimizer]) -> None:
    model, optimizer = stepped(cls)
    signal = collect_adam_signal(optimizer, model)
    assert (signal.optimizer, signal.foreign, signal.step) == (cls.__name__, False, 3)


def quantized(tensor: Tensor) -> Tensor:
    class OptimState(Tensor):
        pass

    return tensor.as_subclass(OptimState)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"exp_avg_sq": None}, "no exp_avg_sq for 'embed.weight'"),
        ({"exp_avg_sq": torch.zeros(3)}, r"shape \(3,\) .* isn't one value per weight"),
        ({"exp_avg_sq_row": torch.zeros(3)}, "factored"),
        ({"GG": [torch.eye(3)]}, "rotated basis"),
        ({"step": 0}, "is at step 0"),
        ({"step": None}, "keeps no step for 'embed.weight'"),
    ],
)
def test_state_that_is_no_elementwise_moment_is_refused(
    entries: dict[str, Any], message: str
) -> None:
    model, optimizer = stepped(Foreign)
    alter_state(optimizer, **entries)
    with pytest.raises(InputError, match=f"optimizer Foreign.*{message}"):
        collect_adam_signal(optimizer, model)


def test_quantized_and_integer_moments_are_refused() -> None:
    model, optimizer = stepped(torch.optim.AdamW)
    state = optimizer.state[model.embed.weight]
    moment = state["exp_avg_sq"]
    for bad in (quantized(moment), moment.to(torch.uint8)):
        state["exp_avg_sq"] = bad
        with pytest.raises(InputError, match="embed.weight.*not plain floating point"):
            collect_adam_signal(optimizer, model)


def test_an_optimizer_without_beta2_is_refused() -> None:
    model, optimizer = stepped(Foreign)
    optimizer.param_groups[0]["betas"] = (0.9,)
    with pytest.raises(InputError, match="beta2 in"):
        collect_adam_signal(optimizer, model)


def test_a_step_kept_by_the_parameter_group_counts() -> None:
    model, optimizer = stepped(Foreign)
    for state in optimizer.state.values():
        del state["step"]
    optimizer.param_groups[0]["step"] = 3
    with pytest.warns(UserWarning, match="Foreign"):
        assert collect_adam_signal(optimizer, model).step == 3


def test_accelerates_wrapper_is_opened() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, optimizer = stepped(torch.optim.AdamW)
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    direct, inside = collect_adam_signal(optimizer, model), collect_adam_signal(wrapped, model)
    assert isinstance(inside, AdamSignal) and inside == direct
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="optimizer SGD"):
        collect_adam_signal(accelerate.Accelerator(cpu=True).prepare_optimizer(sgd), model)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"fused": True}, "fused"), ({"foreach": True}, "foreach"), ({}, "default")],
)
def test_the_implementation_is_recorded_and_changes_nothing(
    options: dict[str, Any], name: str
) -> None:
    model, optimizer = stepped(torch.optim.AdamW, **options)
    reference = collect_adam_signal(*reversed(stepped(torch.optim.AdamW, foreach=False)))
    signal = collect_adam_signal(optimizer, model)
    assert signal.implementation == name
    assert signal.mass == pytest.approx(reference.mass, rel=1e-5)
