"""What an attached model refuses outside its forwards: copies, pickles, traces, changes of its
parameters. Each is refused at once, and the model goes on as before.
"""

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from lib.errors import InputError, PlacementError
from lib.tiering import Runtime, attach

X = torch.linspace(-1, 1, 2 * 64).reshape(2, 64)
EVERYTHING = {"HBM": None, "SSD": None}
PLACES: dict[str, dict[str, Any]] = {
    "resident": {"budget": EVERYTHING},
    "compressed": {"budget": EVERYTHING, "precision": "int4"},
    "streamed": {"hints": {"0": "SSD", "1.0": "SSD"}},
    "compressed and streamed": {"hints": {"0": "SSD", "1.0": "SSD"}, "precision": "int8"},
    "emulated": {"hints": {"0": "SSD", "1.0": "SSD"}, "mode": "emulated"},
}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.ReLU())).eval()


class Wrapper(nn.Module):
    """A user's model with an attached one in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.model(x))
        return result


def attached(place: str, folder: Path) -> tuple[nn.Sequential, Runtime, Tensor]:
    model, options = layers(), dict(PLACES[place])
    if place != "emulated":
        options["spill_dir"] = folder / "spill"
    runtime = attach(model, options.pop("hints", None), **options)
    with torch.no_grad():
        return model, runtime, model(X)


def check_unharmed(model: nn.Module, runtime: Runtime, before: Tensor) -> None:
    """The model runs as before, and detach gives back what was given, without a trace."""
    plain = layers()
    with torch.no_grad():
        assert torch.equal(model(X), before)
        runtime.detach()
        assert torch.equal(model(X), plain(X))
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert vars(module).keys() - {"_is_torch_compile"} == vars(other).keys()
        assert type(module._parameters) is dict
    copied = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    assert torch.equal(copied(X), plain(X))


WHOLE: dict[str, Callable[[nn.Sequential], Any]] = {
    "the model": lambda model: model,
    "a layer": lambda model: model[0],
    "a container": lambda model: model[1],
    "a layer without weights": lambda model: model[1][1],
    "a list of layers": lambda model: [model[0], model[1]],
    "a model around it": Wrapper,
}
CASES = [("the model", place) for place in PLACES]
CASES += [(what, "streamed") for what in list(WHOLE)[1:]] + [("a layer", "resident")]
UNTRACED = ("a layer without weights", "a list of layers")
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "pickle 2": lambda what: pickle.dumps(what, 2),
    "torch.save": lambda what: torch.save(what, io.BytesIO()),
    "another process": ForkingPickler.dumps,
}


@pytest.mark.parametrize(("what", "place"), CASES)
@pytest.mark.parametrize("way", COPIES)
def test_copies_and_pickles_are_refused(way: str, what: str, place: str, tmp_path: Path) -> None:
    model, runtime, before = attached(place, tmp_path)
    if way == "copy" and what in ("a list of layers", "a model around it"):
        COPIES[way](WHOLE[what](model))  # refers to the attached model itself
    else:
        with pytest.raises(PlacementError, match=r"detach the runtime first, or .*state_dict"):
            COPIES[way](WHOLE[what](model))
    check_unharmed(model, runtime, before)


@pytest.mark.parametrize("way", COPIES)
def test_a_runtime_is_not_copied(way: str, tmp_path: Path) -> None:
    model, runtime, before = attached("streamed", tmp_path)
    with pytest.raises(PlacementError, match="attach to each copy"):
        COPIES[way](runtime)
    check_unharmed(model, runtime, before)


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", **options)(X)


def onnx(model: nn.Module) -> None:
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, (X,), io.BytesIO(), dynamo=True)


TRACERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.jit.trace": lambda model: torch.jit.trace(model, X),
    "a traced function": lambda model: torch.jit.trace(lambda x: model(x), X),
    "torch.jit.trace_module": lambda model: torch.jit.trace_module(model, {"forward": X}),
    "torch.jit.script": torch.jit.script,
    "torch.export": lambda model: torch.export.export(model, (X,)),
    "strict torch.export": lambda model: torch.export.export(model, (X,), strict=True),
    "torch.compile": compiled,
    "torch.compile, whole": lambda model: compiled(model, fullgraph=True),
    "a compiled function": lambda model: compiled(lambda x: model(x) + 1),
    "torch.onnx": onnx,
    "torch.onnx, the older": lambda model: torch.onnx.export(
        model, (X,), io.BytesIO(), dynamo=False
    ),
    "torch.fx": torch.fx.symbolic_trace,
    "make_fx": lambda model: make_fx(lambda x: model(x))(X),
    "make_fx, symbolic": lambda model: make_fx(lambda x: model(x), tracing_mode="symbolic")(X),
}


COMPILERS = ("torch.compile", "torch.compile, whole", "a compiled function")
RESIDENT = ("resident", "compressed")
TRACES = [
    (tracer, what, place)
    for tracer in TRACERS
    for what, place in CASES
    if what not in UNTRACED
    and (what, place) != ("a layer", "resident")
    and not (tracer in COMPILERS and place in RESIDENT)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tracer", "what", "place"), TRACES)
def test_traces_are_refused(tracer: str, what: str, place: str, tmp_path: Path) -> None:
    model, runtime, before = attached(place, tmp_path)
    with torch.no_grad(), pytest.raises(PlacementError, match=r"detach"):
        TRACERS[tracer](WHOLE[what](model))
    check_unharmed(model, runtime, before)


@pytest.mark.parametrize(
    ("compiler", "place"),
    [*((name, "resident") for name in COMPILERS), ("torch.compile", "compressed")],
)
def test_what_resides_compiles(compiler: str, place: str, tmp_path: Path) -> None:
    model, runtime, before = attached(place, tmp_path)
    with torch.no_grad():
        found = TRACERS[compiler](model)
    assert torch.equal(found, before + 1 if compiler == "a compiled function" else before)
    check_unharmed(model, runtime, before)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_a_layer_in_memory_computes_no_other_numbers_once_it_is_away(
    tmp_path: Path,
) -> None:
    model, runtime, _ = attached("resident", tmp_path)
    with torch.no_grad():
        expected, traced = model[0](X), torch.jit.trace(model[0], X)
        assert torch.equal(traced(X), expected)
        runtime.budget = {"HBM": runtime.plan.fast_bytes * 2 // 3, "SSD": None}
        assert torch.equal(model[0](X), expected)
        with pytest.raises(RuntimeError):
            traced(X)
        runtime.detach()
        assert torch.equal(traced(X), expected)


def test_fake_tensors_and_a_compiled_call_are_refused(tmp_path: Path) -> None:
    model, runtime, before = attached("streamed", tmp_path)
    with pytest.raises(PlacementError, match=r"torch\.compile and torch\.export can't trace"):
        model.compile()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with pytest.raises(PlacementError, match="FakeTensorMode can't trace"):
            model(torch.empty(2, 64))
    check_unharmed(model, runtime, before)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "to": lambda model: model.to(torch.float16),
    "half": lambda model: model[1].half(),
    "share_memory": lambda model: model.share_memory(),
    "load_state_dict": lambda model: model.load_state_dict(layers().state_dict()),
    "load_state_dict, assigning": lambda model: model.load_state_dict(
        layers().state_dict(), assign=True
    ),
    "setting": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(64, 64))),
    "deleting": lambda model: delattr(model[0], "weight"),
    "adding": lambda model: model[0].register_parameter("extra", nn.Parameter(torch.ones(1))),
    "prune": lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
    "weight_norm": lambda model: nn.utils.weight_norm(model[0]),
    "spectral_norm": lambda model: nn.utils.spectral_norm(model[0]),
    "a parametrization": lambda model: parametrize.register_parametrization(
        model[0], "weight", nn.Identity()
    ),
    "spectral_norm's parametrization": lambda model: parametrizations.spectral_norm(model[0]),
    "fusing": lambda model: nn.utils.fuse_linear_bn_eval(model[0], nn.BatchNorm1d(64).eval()),
    "averaging": torch.optim.swa_utils.AveragedModel,
    "quantizing": lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_parameters_are_refused(change: str, place: str, tmp_path: Path) -> None:
    model, runtime, before = attached(place, tmp_path)
    if change == "DistributedDataParallel":
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
        )
    try:
        with pytest.raises(PlacementError, match="detach"):
            CHANGES[change](model)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    check_unharmed(model, runtime, before)


HARMLESS: dict[str, Callable[[nn.Sequential], Any]] = {
    "apply": lambda model: model.apply(lambda module: None),
    "requires_grad_": lambda model: model.requires_grad_(False).requires_grad_(True),
    "train and eval": lambda model: model.train().eval(),
    "zero_grad": lambda model: model.zero_grad(),
    "repr": repr,
    "DataParallel": lambda model: nn.DataParallel(model)(X),
    "the same parameter": lambda model: setattr(model[0], "weight", model[0].weight),
    "stack_module_state": lambda model: torch.func.stack_module_state([model, model]),
    "functional_call": lambda model: torch.func.functional_call(model, layers().state_dict(), X),
    "counting": lambda model: FlopCounterMode(model, display=False),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", HARMLESS)
def test_what_leaves_the_weights_alone_works(call: str, place: str, tmp_path: Path) -> None:
    model, runtime, before = attached(place, tmp_path)
    with torch.no_grad():
        HARMLESS[call](model)
    check_unharmed(model, runtime, before)


def test_what_was_set_on_a_module_before_attach_is_there_after_detach(tmp_path: Path) -> None:
    model = layers()
    model[0].compile = "mine"  # type: ignore[assignment]
    with attach(model, {"0": "SSD", "1.0": "SSD"}, spill_dir=tmp_path):
        with pytest.raises(PlacementError):
            model[0].compile()
    assert model[0].compile == "mine"
    with pytest.raises(InputError, match="compiled"):
        attach(torch.compile(model, backend="eager"), budget=EVERYTHING)
