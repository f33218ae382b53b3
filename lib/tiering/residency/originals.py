"""The model as it was given: its parameters' weights, homes and flags, for reading and for
restoring.

A model on the meta device gets its weights from a checkpoint. Its own parameters become real ones
until detach, so that other references to them see the weights, too; and its persistent buffers
get the checkpoint's values.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ...blocks import unique_parameters
from ...checkpoint.source import CheckpointSource
from ...errors import InputError, PlacementError
from ..stores import byte_view
from .stand_ins import OffloadedParameter, set_weights, swap_contents

_OWN_TENSORS = {"_parameters", "_buffers", "_modules"}


class Originals:
    """What detach must give back.

    Raises InputError for parameters that can't be offloaded: subclasses, overlapping or shared
    memory, and meta tensors without a checkpoint.
    """

    def __init__(self, model: nn.Module, checkpoint: CheckpointSource | None) -> None:
        self._given = unique_parameters(model)
        for name, parameter in self._given.items():
            _check_parameter(name, parameter, in_checkpoint=checkpoint is not None)
        if checkpoint is None:
            _check_own_memory(self._given)
        else:
            _check_checkpoint(self._given, checkpoint)
        self.model = model
        self._checkpoint = checkpoint
        self._experts: list[tuple[Any, Any]] = []
        self._frozen = False
        self._flagged: set[str] = set()
        """The parameters that get their flag again once gradients are not recorded."""
        self._swapped: dict[str, nn.Parameter] = {}
        """What each meta parameter was, while it is a real one."""
        self._homes = {name: parameter.device for name, parameter in self._given.items()}
        self._buffers = [(buffer, buffer.device) for buffer in model.buffers()]
        self._loaded: list[tuple[Tensor, Tensor]] = []
        """Buffers that have a checkpoint's values, with what they were."""
        self._trainable = {name for name, value in self._given.items() if value.requires_grad}
        self.parameters: Mapping[str, nn.Parameter] = self._given
        """The parameters to work on, by canonical name."""
        self.stored: dict[str, Callable[[int | None, int | None], Tensor]] = {}
        """How to read those that are held compressed, whole (None) or rows [start, end)."""
        self.shapes = {
            name: torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device="meta"
            )
            for name, value in self._given.items()
        }

    @property
    def trains(self) -> bool:
        """Some parameters are trainable."""
        return bool(self._trainable)

    @property
    def from_checkpoint(self) -> bool:
        """The weights are a checkpoint's: nothing in memory needs to be kept."""
        return self._checkpoint is not None

    def prepare(self, device: torch.device, *, one_expert_at_a_time: Iterable[str] = ()) -> None:
        """Make meta parameters real ones without weights, and bring the buffers to the device."""
        if self._checkpoint is not None:
            _refuse_other_meta_tensors(self.model, self._given)
            for name, parameter in self._given.items():
                real = nn.Parameter(
                    torch.empty(0, dtype=parameter.dtype, device=device),
                    requires_grad=parameter.requires_grad,
                )
                if parameter._use_count() > 1:  # type: ignore[attr-defined]
                    raise InputError(
                        f"parameter {name!r} is part of a computation already: build the model "
                        "again and attach before it is used"
                    )
                swap_contents(parameter, real)
                self._swapped[name] = real
            self._load_buffers(self._checkpoint)
        for name, buffer in self.model.named_buffers():
            if buffer.device.type == "meta":
                raise InputError(
                    f"buffer {name!r} is on the meta device and in no checkpoint: build the model "
                    "with tierhints.tiering.empty_weights()"
                )
            buffer.data = buffer.data.to(device)

        for name in one_expert_at_a_time:
            # transformers' grouped kernels take the weights of all experts as one tensor.
            config: Any = getattr(self.model.get_submodule(name), "config", None)
            if hasattr(config, "_experts_implementation"):
                self._experts.append((config, config._experts_implementation))
                config._experts_implementation = "eager"

    def match_grad_mode(self, *, compressed: bool) -> None:
        """Give the parameters the flags for a forward: their own, by which torch.matmul chooses how
        to compute, or none where gradients would be recorded (a backward pass would find weights
        that have gone again), and where some are ``compressed``, since kernels record none.

        Raises PlacementError where gradients were asked for since attach.
        """
        frozen = compressed or torch.is_grad_enabled()
        if frozen == self._frozen:
            return
        with torch._C.DisableTorchFunctionSubclass():
            if frozen:
                self._flagged = {n for n, value in self.parameters.items() if value.requires_grad}
                for name in self._flagged - self._trainable:
                    raise PlacementError(
                        f"requires_grad of {name!r} was set while a runtime holds the model: "
                        "offloaded weights serve inference only; detach first"
                    )
            for name in self._flagged:
                self.parameters[name].requires_grad_(not frozen)
        self._frozen = frozen

    def read(self, name: str, start: int | None = None, end: int | None = None) -> Tensor:
        """Return a parameter's weights, or rows [start, end), in host memory; read-only."""
        if self._checkpoint is not None:
            weights = self._checkpoint.read(name, start, end).to(self._given[name].dtype)
            shape = self.shapes[name]
            if start is None and weights.stride() != shape.stride():
                weights = torch.empty_strided(
                    shape.size(), shape.stride(), dtype=shape.dtype
                ).copy_(weights)
            return weights
        if name in self.stored:
            return self.stored[name](start, end)
        weights = self.parameters[name].data
        return (weights if start is None else weights[start:end]).cpu()

    def reading_ahead(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Read these weights ahead, in the order in which they will be asked for."""
        if self._checkpoint is None:
            return nullcontext()
        return self._checkpoint.reading_ahead(names)

    def identity(self, name: str, expert: int | None = None) -> str:
        """Name a parameter's weights, or one expert's, by their content, or by the file they are in
        and its times.
        """
        if self._checkpoint is not None:
            return self._checkpoint.identity(name)
        return self.contents(name, expert)

    def contents(self, name: str, expert: int | None = None) -> str:
        """Name what a parameter has in memory, or had before it was compressed, by the bytes."""
        if expert is not None:
            weights = self.read(name, expert, expert + 1)
        else:
            weights = self.read(name) if name in self.stored else self.parameters[name].data
        flat = weights.as_strided((weights.numel(),), (1,), weights.storage_offset()).cpu()
        return xxhash.xxh3_128_hexdigest(byte_view(flat.view(torch.uint8)))

    def home(self, name: str) -> torch.device:
        """Return the device on which a parameter was given."""
        return self._homes[name]

    def restore(self, lost: list[str]) -> None:
        """Put flags, devices and meta tensors back; parameters in ``lost`` are left as they are."""
        for name, meta in self._swapped.items():
            set_weights(self._given[name], torch.empty(0, dtype=meta.dtype))
            swap_contents(self._given[name], meta)
        self._swapped.clear()
        for buffer, before in self._loaded:
            buffer.data = before
        self._loaded.clear()
        for name, parameter in self._given.items():
            if name not in lost:
                if self._checkpoint is None and parameter.device != self._homes[name]:
                    parameter.data = parameter.data.to(self._homes[name])
                parameter.requires_grad_(name in self._trainable)
        for buffer, home in self._buffers:
            buffer.data = buffer.data.to(home)
        while self._experts:
            config, implementation = self._experts.pop()
            config._experts_implementation = implementation

    def _load_buffers(self, checkpoint: CheckpointSource) -> None:
        """Give persistent buffers (batch statistics, a router's bias) the checkpoint's values."""
        for path, module in self.model.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is None or key in module._non_persistent_buffers_set:
                    continue
                name = f"{path}.{key}" if path else key
                if name not in checkpoint:
                    raise InputError(
                        f"buffer {name!r} belongs to the model's state and is not in checkpoint "
                        f"{checkpoint.path}: give a whole checkpoint, or register the buffer with "
                        "persistent=False"
                    )
                _check_shape("buffer", name, buffer, checkpoint)
                if buffer.device.type == "meta":
                    raise InputError(
                        f"buffer {name!r} is on the meta device: build the model with "
                        "tierhints.tiering.empty_weights()"
                    )
                self._loaded.append((buffer, buffer.data))
                buffer.data = checkpoint.read(name).to(buffer.dtype)


def _check_parameter(name: str, parameter: nn.Parameter, *, in_checkpoint: bool) -> None:
    if isinstance(parameter, OffloadedParameter):
        raise PlacementError(
            f"parameter {name!r} was not restored when a runtime was detached: detach that runtime "
            "again, or load the model again"
        )
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        raise InputError(
            f"parameter {name!r} is a {type(parameter.data).__name__}: only plain dense tensors "
            "can be offloaded"
        )
    if parameter.is_inference():
        raise InputError(
            f"parameter {name!r} was made in inference mode: build the model outside it"
        )
    if in_checkpoint != (parameter.device.type == "meta"):
        raise InputError(
            f"parameter {name!r} is on {parameter.device}: weights= is for models on the meta "
            "device (tierhints.tiering.empty_weights())"
            if in_checkpoint
            else f"parameter {name!r} is on the meta device: load its weights first, or give the "
            "checkpoint as weights="
        )
    if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
        raise InputError(
            f"parameter {name!r} has overlapping or padded memory: make it contiguous first"
        )


def _check_checkpoint(parameters: Mapping[str, nn.Parameter], checkpoint: CheckpointSource) -> None:
    for name, parameter in parameters.items():
        _check_shape("parameter", name, parameter, checkpoint)


def _check_shape(kind: str, name: str, tensor: Tensor, checkpoint: CheckpointSource) -> None:
    shape = checkpoint.shape(name)
    if tuple(shape) != tuple(tensor.shape):
        raise InputError(
            f"{kind} {name!r} is {tuple(tensor.shape)} in the model and {tuple(shape)} in the "
            "checkpoint: build the model from the checkpoint's own config.json"
        )


def _refuse_other_meta_tensors(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse tensors that modules made from weights in their constructors: CPU kernels would
    compute with them, and with memory that was never written.
    """
    known = {id(parameter) for parameter in parameters.values()}
    known |= {id(buffer) for buffer in model.buffers()}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            for tensor in () if key in _OWN_TENSORS else _tensors(value):
                made = tensor.device.type == "meta" or isinstance(tensor, nn.Parameter)
                if made and id(tensor) not in known:
                    raise InputError(
                        f"module {path!r} keeps a tensor in {key!r} that was made from weights and "
                        "is in no checkpoint: make it in forward(), or give the model with its "
                        "weights"
                    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _check_own_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters tied by memory and not by identity: offloading would part them."""
    seen: dict[int, str] = {}
    for name, parameter in parameters.items():
        if parameter.numel():
            other = seen.setdefault(parameter.data_ptr(), name)
            if other != name:
                raise InputError(
                    f"parameters {other!r} and {name!r} share memory but are two parameters: tie "
                    "them by assigning the same Parameter to both"
                )
