"""The Triton kernels: computed by Triton's interpreter on a CPU, on a GPU where there is one, and
compiled for GPUs without any.

Triton asks for ``TRITON_INTERPRET`` when it is imported, so a process of its own interprets.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.codecs.layout import PLANE_BITS, Codec
from lib.codecs.records import decode, encode

triton = pytest.importorskip("triton", reason="Triton isn't installed (the extra triton has it)")

from lib.codecs import triton_kernels, triton_ops  # noqa: E402

PRECISIONS = {sum(bits): precision for precision, bits in PLANE_BITS.items()}
READ_OF_STORED = [
    (bits, stored)
    for stored, precision in PRECISIONS.items()
    for bits, prefix in PRECISIONS.items()
    if PLANE_BITS[precision][: len(PLANE_BITS[prefix])] == PLANE_BITS[prefix]
]
Described = tuple[int, int, int, int, int]
"""Rows, cols, group size, bits as stored and as read."""
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not INTERPRETS, reason="run by test_in_the_interpreter")
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of a result, over it."""
if INTERPRETS:
    ROUNDING[torch.bfloat16] *= 2  # it cuts bits off
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""Shared memory that a program may have, by compute capability: the least of 8.x, and of 9.0."""


def make(
    shape: tuple[int, int], group_size: int, bits: int, stored: int, device: str
) -> tuple[Tensor, Described, Tensor]:
    """Return a record as far as it is read, what operators are told of it, and its weights."""
    torch.manual_seed(shape[1])
    codec = Codec(PRECISIONS[stored], group_size)
    layout = codec.layout(*shape).prefix(PRECISIONS[bits])
    record = encode(torch.randn(shape) * 0.02 + 0.005, codec)[: layout.num_bytes].clone()
    weights = decode(record, layout).double().to(device)
    return record.to(device), (*shape, group_size, stored, bits), weights


def check_linear(
    record: Tensor, described: Described, weights: Tensor, x: Tensor, bias: Tensor | None
) -> None:
    y = triton_ops.linear(x, record, bias, *described, 0)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], len(weights))
    expected = x.double() @ weights.t()
    room = x.double().abs() @ weights.abs().t()
    if bias is not None:
        expected, room = expected + bias.double(), room + bias.double().abs()
    few = x[..., 0].numel() <= triton_ops.FEW_ROWS
    bound = ROUNDING[x.dtype] + (2.0**-20 if few else triton_ops.TILE_ERROR[x.dtype])
    assert ((y.double() - expected).abs() <= bound * room).all(), (described, x.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits,stored", READ_OF_STORED)
def test_it_computes_what_the_reference_decodes(bits: int, stored: int, device: str) -> None:
    record, described, weights = make((5, 100), 32, bits, stored, device)
    for num_rows in (2, triton_ops.FEW_ROWS + 1):
        x = torch.randn(num_rows, 100, device=device)
        check_linear(record, described, weights, x, None)
    largest = weights.abs().max()
    some = triton_ops.decode(record, *described, 2, 5, torch.float32)
    assert (some - weights[2:]).abs().max() <= 2.0**-22 * largest
    ids = torch.tensor([[4, 0, 2], [0, 0, 1]], device=device)
    found = triton_ops.look_up(ids, record, *described, torch.float32)
    assert (found - weights[ids]).abs().max() <= 2.0**-22 * largest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape,group_size,bits",
    [((1, 1), 64, 3), ((5, 577), 128, 5), ((70, 64), 0, 4), ((2, 1056), 256, 8)],
    ids=str,
)
def test_any_shape_and_group(
    shape: tuple[int, int], group_size: int, bits: int, device: str
) -> None:
    record, described, weights = make(shape, group_size, bits, bits, device)
    for leading in ((1,), (4,), (2, 10), (0,)):
        x = torch.randn(*leading, shape[1], device=device)
        check_linear(record, described, weights, x, torch.randn(shape[0], device=device))
    empty = torch.empty(2, 0, dtype=torch.int64, device=device)
    found = triton_ops.look_up(empty, record, *described, torch.float32)
    assert found.shape == (2, 0, shape[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back(dtype: torch.dtype, device: str) -> None:
    record, described, weights = make((5, 100), 64, 6, 6, device)
    for num_rows in (1, triton_ops.FEW_ROWS + 1):
        x = torch.randn(num_rows, 100, device=device).to(dtype)
        check_linear(record, described, weights, x, torch.randn(5, device=device).to(dtype))
    rows = triton_ops.decode(record, *described, 0, 5, dtype)
    error = (rows.double() - weights).abs()
    assert rows.dtype == dtype and (error <= ROUNDING[dtype] * weights.abs() + 2.0**-22).all()


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_multiplied_as_they_are_seen(device: str) -> None:
    record, described, weights = make((19, 64), 32, 6, 6, device)
    strided = torch.randn(64, 3, device=device).t()
    check_linear(record, described, weights, strided, None)
    check_linear(
        record, described, weights, torch.randn(400, device=device)[7:327].view(5, 64), None
    )


@pytest.mark.parametrize("device", DEVICES)
def test_an_id_outside_the_matrix_reads_nothing(device: str) -> None:
    record, described, weights = make((19, 64), 32, 4, 4, device)
    ids = torch.tensor([19, -1, 18, 1 << 40], device=device)
    found = triton_ops.look_up(ids, record, *described, torch.float32)
    assert found[[0, 1, 3]].isnan().all() and not found[2].isnan().any()


@pytest.mark.skipif(INTERPRETS, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "not gpu", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


class NoGpu:
    """Stands in for Triton's driver: a device of some compute capability, for compilation alone."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # each has kernels of its own, and a real device 0 isn't touched

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.shared_bytes: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, **options: int) -> None:
        compiled = self.kernel.warmup(*args, grid=(1,), **options)
        self.shared_bytes.append(compiled.metadata.shared)


@pytest.mark.skipif(INTERPRETS, reason="interpreted kernels aren't compiled")
@pytest.mark.parametrize(
    "capability,bits,shape,dtype",
    [
        (80, 4, (256, 577), torch.float16),
        pytest.param(80, 5, (256, 577), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(80, 8, (1, 4096), torch.float32, marks=pytest.mark.slow),
        pytest.param(90, 3, (256, 576), torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_without_a_gpu(
    capability: int,
    bits: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu(capability))
    kernels = {}
    for name in ("multiply_few", "multiply_tiles", "decode_rows"):
        kernels[name] = Compiled(getattr(triton_kernels, name))
        monkeypatch.setattr(triton_kernels, name, kernels[name])
    record, described, _ = make(shape, 64, bits, bits, "cpu")
    for num_rows in (2, 64):
        x = torch.randn(num_rows, shape[1], dtype=dtype)
        triton_ops.linear(x, record, torch.zeros(shape[0], dtype=dtype), *described, 0)
    triton_ops.look_up(torch.tensor([0]), record, *described, dtype)
    triton_ops.decode(record, *described, 0, 1, dtype)
    shared = [kernel.shared_bytes for kernel in kernels.values()]
    assert [len(launches) for launches in shared] == [1, 1, 2]
    assert max(map(max, shared)) <= SHARED_BYTES[capability]
