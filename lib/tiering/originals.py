"""The model as it was given: its parameters' weights, homes and flags, for reading and for
restoring.

A model on the meta device gets its weights from a checkpoint: parameters of ours stand in for the
meta ones until detach.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ..blocks import unique_parameters
from ..errors import InputError
from .sources import CheckpointSource
from .stores import byte_view


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
        self._homes = {name: parameter.device for name, parameter in self._given.items()}
        self._buffers = [(buffer, buffer.device) for buffer in model.buffers()]
        self._trainable = [name for name, value in self._given.items() if value.requires_grad]
        self.parameters: Mapping[str, nn.Parameter] = dict(self._given)
        """The parameters to work on, by canonical name."""
        self.shapes = {
            name: torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device="meta"
            )
            for name, value in self._given.items()
        }

    @property
    def from_checkpoint(self) -> bool:
        """The weights are a checkpoint's: nothing in memory needs to be kept."""
        return self._checkpoint is not None

    def prepare(self, device: torch.device, *, one_expert_at_a_time: Iterable[str] = ()) -> None:
        """Freeze the parameters, put stand-ins for meta ones, and bring the buffers to the
        device.
        """
        if self._checkpoint is not None:
            self.parameters = {
                name: nn.Parameter(
                    torch.empty(0, dtype=value.dtype, device=device), requires_grad=False
                )
                for name, value in self._given.items()
            }
            self._swap({id(self._given[name]): value for name, value in self.parameters.items()})
        for parameter in self.parameters.values():
            # A backward pass would find weights that have gone again.
            parameter.requires_grad_(False)
        for name, buffer in self.model.named_buffers():
            if buffer.device.type == "meta":
                raise InputError(
                    f"buffer {name!r} is on the meta device and in no checkpoint: build the model "
                    "with lib.tiering.empty_weights()"
                )
            buffer.data = buffer.data.to(device)

        for name in one_expert_at_a_time:
            # transformers' grouped kernels take the weights of all experts as one tensor.
            config: Any = getattr(self.model.get_submodule(name), "config", None)
            if hasattr(config, "_experts_implementation"):
                self._experts.append((config, config._experts_implementation))
                config._experts_implementation = "eager"

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
        weights = self.parameters[name].data
        return (weights if start is None else weights[start:end]).cpu()

    def identity(self, name: str) -> str:
        """Name a parameter's weights by their content, or by the file they are in and its times."""
        if self._checkpoint is not None:
            return self._checkpoint.identity(name)
        weights = self.parameters[name].data
        flat = weights.as_strided((weights.numel(),), (1,), weights.storage_offset()).cpu()
        return xxhash.xxh3_128_hexdigest(byte_view(flat.view(torch.uint8)))

    def home(self, name: str) -> torch.device:
        """Return the device on which a parameter was given."""
        return self._homes[name]

    def restore(self, lost: list[str]) -> None:
        """Put flags, devices and stand-ins back; parameters in ``lost`` are left as they are."""
        if self._checkpoint is not None:
            self._swap({id(value): self._given[name] for name, value in self.parameters.items()})
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

    def _swap(self, replacements: Mapping[int, nn.Parameter]) -> None:
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in replacements:
                    module._parameters[key] = replacements[id(parameter)]


def _check_parameter(name: str, parameter: nn.Parameter, *, in_checkpoint: bool) -> None:
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
            "device (lib.tiering.empty_weights())"
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
        shape = checkpoint.shape(name)
        if tuple(shape) != tuple(parameter.shape):
            raise InputError(
                f"parameter {name!r} is {tuple(parameter.shape)} in the model and {tuple(shape)} "
                "in the checkpoint: build the model from the checkpoint's own config.json"
            )


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
