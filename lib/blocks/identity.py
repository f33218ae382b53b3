"""Which weights these are: a digest of samples, the same wherever the weights are and in any dtype.

The digest is the SHA-256 over each parameter's canonical name, its shape, and a sample of its
values rounded to bfloat16, parameters in the order of their names. A model loaded in bfloat16 thus
has the digest of its float32 original; float16 may round twice and differ. It is an identity and no
integrity check. Two schemes say what is sampled of a parameter's elements, flattened in row-major
order:

| a digest begins with | sampled of a parameter |
| --- | --- |
| ``sha256-ranges:`` | 16 runs of 1024 elements, evenly spaced, the first and the last included |
| ``sha256:`` | 65,536 elements, evenly spaced: what hints that were made before have |

Either takes a parameter whole that is not larger. Runs cost a checkpoint a few small reads; every
page of it holds some of evenly spaced elements. New digests are of the first scheme, the second is
computed only to compare with a digest that a file has.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .parameters import unique_parameters, whole_tensor

Run = tuple[int, int]
"""Elements [start, end) of a flattened parameter."""
Sample = Callable[[Sequence[Run]], Tensor]
"""Returns these elements of a parameter, one run after another: 1-D, in its own dtype."""

_RANGES, _EVEN = "sha256-ranges", "sha256"
_NUM_RUNS, _RUN_ELEMENTS = 16, 1024
_EVEN_ELEMENTS = 65_536


def parameter_digest(model: nn.Module, like: str = "") -> str:
    """Identify a model's weights in memory, in the scheme of another digest (default: today's).

    Gathers DTensors (collective: every rank must call it). It is cheap, so nobody keeps it: weights
    may change in ways that no counter shows.
    """
    return digest_samples(
        (
            (name, parameter.shape, _tensor_sample(whole_tensor(parameter.detach())))
            for name, parameter in sorted(unique_parameters(model).items())
        ),
        like,
    )


def digest_samples(parameters: Iterable[tuple[str, torch.Size, Sample]], like: str = "") -> str:
    """Return the digest of parameters (canonical name, shape, sample), which come sorted by name,
    in the scheme of another digest (default: today's).
    """
    scheme = _EVEN if like.startswith(f"{_EVEN}:") else _RANGES
    digest = hashlib.sha256()
    for name, shape, sample in parameters:
        digest.update(f"{name}:{tuple(shape)};".encode())
        values = _even_elements(shape, sample) if scheme == _EVEN else sample(_sampled_runs(shape))
        if values.is_floating_point():
            values = values.to(torch.bfloat16)
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{scheme}:{digest.hexdigest()}"


def _sampled_runs(shape: torch.Size) -> list[Run]:
    """Return the runs that today's scheme takes of a parameter."""
    num_elements = shape.numel()
    if num_elements <= _NUM_RUNS * _RUN_ELEMENTS:
        return [(0, num_elements)]
    last = num_elements - _RUN_ELEMENTS
    starts = (last * index // (_NUM_RUNS - 1) for index in range(_NUM_RUNS))
    return [(start, start + _RUN_ELEMENTS) for start in starts]


def _tensor_sample(tensor: Tensor) -> Sample:
    """Sample a tensor on any device and of any strides."""

    def sample(runs: Sequence[Run]) -> Tensor:
        if tensor.is_contiguous():
            flat = tensor.reshape(-1)
            return torch.cat([flat[start:end] for start, end in runs])
        row = tensor[0].numel()  # copied in order, rows of the first dimension at a time
        parts = []
        for start, end in runs:
            rows = tensor[start // row : -(-end // row)].reshape(-1)
            first = start // row * row
            parts.append(rows[start - first : end - first])
        return torch.cat(parts)

    return sample


def _even_elements(shape: torch.Size, sample: Sample) -> Tensor:
    num_elements = shape.numel()
    values = sample([(0, num_elements)])
    if num_elements <= _EVEN_ELEMENTS:
        return values
    steps = torch.arange(_EVEN_ELEMENTS, device=values.device)
    return values[steps * num_elements // _EVEN_ELEMENTS]
