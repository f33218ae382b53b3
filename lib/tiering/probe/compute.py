"""Measures how fast this machine multiplies with weights that lie in fast memory, by precision.

What decides decoding is products with a single row of activations: each reads every weight once. A
pass of exact output has some more, and on a processor arithmetic may decide there.
The form of a weight is the one in which a plan would hold it (``precision.kernels``); copies of it
are cycled through, more than a cache holds. Precisions take turns: a busy machine slows all.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ...codecs.kernels import SCRATCH_BYTES, Scratch, Use, prepare
from ...codecs.records import RAW_DTYPES, default_codec, encode
from ...units import MIB
from ...vocabulary import Precision

_SHAPE = (4096, 1024)
"""Rows and columns: out and in features."""
_TRIES = 6
"""Products with several rows that are timed, of which the first warms up."""
_CYCLED_BYTES = {"cpu": 96 * MIB, "cuda": 256 * MIB}
"""Three times a large last-level cache."""
_PRODUCTS = 12
"""Seconds that one timing runs, so that its start and end weigh little."""


def measure_compute(device: torch.device, *, rounds: int) -> dict[str, float]:
    """Return precision -> weights per second of products with one row, the medians of ``rounds``.

    Takes about 100 MiB of memory per precision (a GPU: 300 MiB).
    """
    weight = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    scratch = Scratch(SCRATCH_BYTES, device)
    seconds: dict[Precision, list[float]] = {precision: [] for precision in Precision}
    with torch.inference_mode():
        products = {each: _products(weight, each, device, scratch) for each in Precision}
        for warm_up in (True, *[False] * rounds):
            for precision, cycle in products.items():
                elapsed = _time_products(cycle, device)
                if not warm_up:
                    seconds[precision].append(elapsed)
    return {
        str(precision): weight.numel() / statistics.median(found)
        for precision, found in seconds.items()
    }


@functools.cache
def measure_rows(rows: int, dtype: torch.dtype) -> float:
    """Return the weights per second of this processor's products with so many rows of activations,
    of ``dtype`` like the weights.
    """
    weight = torch.ones(_SHAPE, dtype=dtype, device="cpu")
    x = torch.ones(rows, weight.shape[1], dtype=dtype, device="cpu")
    seconds = []
    with torch.inference_mode():
        for _ in range(_TRIES):
            begin = time.perf_counter()
            functional.linear(x, weight)
            seconds.append(time.perf_counter() - begin)
    return weight.numel() / min(seconds[1:])


def _products(
    weight: Tensor, precision: Precision, device: torch.device, scratch: Scratch
) -> Iterator[Callable[[], Tensor]]:
    """Yield products with one copy after another of the weight, without end."""
    cycled = _CYCLED_BYTES[device.type]
    if dtype := RAW_DTYPES.get(precision):
        matrix = weight.to(device, dtype)
        row = torch.ones(1, weight.shape[1], dtype=dtype, device=device)
        copies = [matrix.clone() for _ in range(-(-cycled // matrix.nbytes))]
        return itertools.cycle([lambda w=copy: functional.linear(row, w) for copy in copies])
    codec = default_codec(precision)
    record, layout = encode(weight, codec), codec.layout(*weight.shape)
    own = torch.float32 if device.type == "cpu" else torch.bfloat16
    row = torch.ones(1, weight.shape[1], dtype=own, device=device)
    held = [
        prepare(
            record.to(device),
            layout,
            dtype=own,
            device=device,
            uses=frozenset({Use.LINEAR}),
            scratch=scratch,
        )
        for _ in range(-(-cycled // layout.num_bytes))
    ]
    return itertools.cycle([lambda w=each: w.linear(row) for each in held])


def _time_products(cycle: Iterator[Callable[[], Tensor]], device: torch.device) -> float:
    """Return the seconds of one product."""
    _synchronize(device)
    begin = time.perf_counter()
    for product in itertools.islice(cycle, _PRODUCTS):
        product()
    _synchronize(device)
    return (time.perf_counter() - begin) / _PRODUCTS


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
