"""Measure what a resident record saves of streaming the weights that it was made from.

    python scripts/experiments/exact/measure_residuals.py --model runs/demo/model --bf16

Of each width, in bits per weight: what any code of the ranks needs (their entropy, given how many
numbers the interval has; for float32 with the lower halves), what residuals take
(``lib/codecs/residuals.py``), and what ranks would take in one width for each block of 64 with
escapes; and the rate at which one thread makes the weights again, bit for bit. Beside them what
needs no record: exponents packed apart (12 bits of bf16), and zlib and zstd (where ``zstandard`` is
there) on planes of bytes. Then the time of a pass on links: the slower of reading and decoding in a
thread of its own. stdout ends with one JSON document.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.codecs.layout import PLANE_BITS
from lib.codecs.planes import unpack_planes
from lib.codecs.records import default_codec, encode, section_views
from lib.codecs.residuals import KnownRows, Residuals, join_chunks
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import add_model_flag, whole_number
from lib.errors import InputError
from lib.files import check_writable
from lib.progress import show_progress
from lib.tiering.stores import PIECE_BYTES, aligned_buffer, byte_view
from lib.units import GB
from lib.vocabulary import Precision

LINKS = {
    "network, 100 MB/s": 0.1,
    "disk, 0.3 GB/s": 0.3,
    "disk, 1.2 GB/s": 1.2,
    "SSD, 3 GB/s": 3.0,
    "SSD, 7 GB/s": 7.0,
    "PCIe 3, 12 GB/s": 12.0,
    "PCIe 4, 25 GB/s": 25.0,
    "PCIe 5, 50 GB/s": 50.0,
}
WIDTHS = (Precision.INT8, Precision.INT6, Precision.INT4)
_BINS = 64
"""Of ranks, beyond which their entropy is that of bins."""
_BLOCK = 64
_ESCAPE_BITS = 6 + 16
"""A place in the block, and the weight."""

_MIDDLE = 1 << 31
"""The least float32 that isn't negative, in their order."""

Fields = dict[str, Any]
Coder = Callable[[bytes], bytes]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.bf16 else None
    matrices = list(read_matrices(args.model, dtype))
    if not matrices:
        raise InputError(f"--model {args.model} has no matrices of float32 or bfloat16")
    weights = sum(matrix.numel() for matrix in matrices)
    original = matrices[0].element_size() * 8
    links = {"this disk": disk_rate(args.disk)} | LINKS
    coded = {str(width): measure_width(matrices, width, args.rounds) for width in WIDTHS}
    document: Fields = {
        "model": args.name,
        "dtype": str(matrices[0].dtype).removeprefix("torch."),
        "weights": weights,
        "bits": original,
        "disk_gb_s": links["this disk"],
        "residuals": coded,
        "without_record": measure_planes(matrices),
        "pass_ms": {
            link: {
                "originals": pass_ms(weights, original, rate, None),
                **{
                    name: pass_ms(weights, fields["packed_bits"], rate, fields["decode_gweights_s"])
                    for name, fields in coded.items()
                },
            }
            for link, rate in links.items()
        },
    }
    emit_json(document, args.json)
    return 0


def pass_ms(weights: int, bits: float, rate: float, decode: float | None) -> float:
    """Return the milliseconds of a pass over a link of ``rate`` GB/s, whose bytes are decoded while
    more of them come.
    """
    link = weights * bits / 8 / (rate * GB)
    return 1e3 * (link if decode is None else max(link, weights / (decode * GB)))


def read_matrices(folder: str, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """Read a checkpoint's matrices, as they are or cast."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.dim() == 2 and tensor.dtype in (torch.float32, torch.bfloat16):
                    yield tensor if dtype is None else tensor.to(dtype)


def measure_width(matrices: Sequence[Tensor], width: Precision, rounds: int) -> Fields:
    """Measure the residuals of all matrices, given their records of a width."""
    sums = dict.fromkeys(("entropy", "packed", "blocks", "escapes", "seconds"), 0.0)
    for weights in show_progress(matrices, str(width), total=len(matrices)):
        matrix = Matrix(weights, width)
        rank, count = matrix.ranks()
        size = weights.numel()
        sums["entropy"] += (rank_entropy(rank, count) + lower_entropy(weights)) * size
        sums["blocks"] += block_bits(rank) + (weights.element_size() * 8 - 16) * size
        sums["escapes"] += int(((rank < 0) | (rank >= count)).sum())
        sums["packed"] += 8 * matrix.encode()
        sums["seconds"] += min(matrix.decode() for _ in range(rounds))
    total = sum(weights.numel() for weights in matrices)
    return {
        "entropy_bits": sums["entropy"] / total,
        "packed_bits": sums["packed"] / total,
        "block_bits": sums["blocks"] / total,
        "escapes": int(sums["escapes"]),
        "decode_gweights_s": total / sums["seconds"] / GB,
    }


def rank_entropy(rank: Tensor, count: Tensor) -> float:
    """Return the bits of ranks given how many numbers there are; of more than 64, of 64 bins and
    what is within a bin.
    """
    few = count.clamp(1, _BINS)
    inside = rank.clamp_min(0).minimum(count - 1)
    place = torch.where(count > _BINS, inside.long() * _BINS // count.clamp_min(1), inside).long()
    within = (count.double() / _BINS).clamp_min(1).log2().mean()
    joint = torch.bincount(few.long() * _BINS + place)
    return float(_entropy(joint) - _entropy(torch.bincount(few.long())) + within)


def _entropy(counts: Tensor) -> Tensor:
    share = counts[counts > 0].double() / counts.sum()
    return -(share * share.log2()).sum()


def lower_entropy(weights: Tensor) -> float:
    """Return the bits of the lower halves of float32 weights, by bytes; 0 for bfloat16."""
    if weights.dtype != torch.float32:
        return 0.0
    planes = weights.contiguous().view(torch.uint8).view(-1, 4)
    return sum(float(_entropy(torch.bincount(planes[:, k].long()))) for k in (0, 1))


def block_bits(rank: Tensor) -> float:
    """Return the bits of ranks in one width for each block, the width that takes the fewest with
    its escapes; 4 bits say which.
    """
    padded = torch.nn.functional.pad(rank, (0, -len(rank) % _BLOCK))
    needed = padded.clamp_min(0).double().add(1).log2().ceil().view(-1, _BLOCK)
    choices = [
        _BLOCK * width + (needed > width).sum(1) * float(_ESCAPE_BITS) for width in range(17)
    ]
    return float(torch.stack(choices).amin(0).sum()) + 4 * len(needed)


def measure_planes(matrices: Sequence[Tensor]) -> Fields:
    """Measure what needs no record: planes of bytes, each by the better of ready-made coders."""
    coders = _coders()
    total, original = sum(map(Tensor.numel, matrices)), matrices[0].element_size()
    found: Fields = {"exponents_apart_bits": original * 8 - 4 + _exponent_escapes(matrices)}
    for name, (pack, unpack) in coders.items():
        packed_bytes, seconds = 0, 0.0
        for weights in show_progress(matrices, name, total=len(matrices)):
            for plane in byte_planes(weights):
                data = plane.numpy().tobytes()
                packed = min(pack(data), data, key=len)
                packed_bytes += len(packed)
                if packed is not data:
                    began = time.process_time()
                    assert unpack(packed) == data
                    seconds += time.process_time() - began
        found[name] = {
            "bits": 8 * packed_bytes / total,
            "decode_gweights_s": total / seconds / GB if seconds else None,
        }
    return found


def byte_planes(weights: Tensor) -> list[Tensor]:
    """Cut weights into planes: exponents first, then sign and highest bits, then the rest."""
    if weights.dtype == torch.bfloat16:
        bits, rest = weights.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF, []
    else:
        planes = weights.contiguous().view(torch.uint8).view(-1, 4)
        bits = planes[:, 2].to(torch.int32) | planes[:, 3].to(torch.int32) << 8
        rest = [planes[:, 1].contiguous(), planes[:, 0].contiguous()]
    exponent, other = bits >> 7 & 0xFF, bits >> 8 & 0x80 | bits & 0x7F
    return [exponent.to(torch.uint8), other.to(torch.uint8), *rest]


def _exponent_escapes(matrices: Sequence[Tensor]) -> float:
    """Return the bits per weight of exponents that aren't among a matrix's 15 most frequent."""
    bits = 0.0
    for weights in matrices:
        counts = torch.bincount(byte_planes(weights)[0].flatten().long(), minlength=256)
        bits += float(counts.sort(descending=True).values[15:].sum()) * (32 + 8)
    return bits / sum(map(Tensor.numel, matrices))


def _coders() -> dict[str, tuple[Coder, Coder]]:
    coders: dict[str, tuple[Coder, Coder]] = {"zlib": (zlib.compress, zlib.decompress)}
    try:
        import zstandard
    except ImportError:
        return coders
    made, read = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    return coders | {"zstd": (made.compress, read.decompress)}


class Matrix:
    """A matrix, its record, and its residuals."""

    def __init__(self, weights: Tensor, width: Precision) -> None:
        self._weights = weights.contiguous()
        codec = default_codec(width)
        self._layout, self._record = codec.layout(*weights.shape), encode(weights, codec)
        self._payload = self._weights.view(torch.uint8).view(-1)
        known = KnownRows(
            offset=0,
            start=0,
            end=len(weights),
            dtype=weights.dtype,
            layout=self._layout,
            record=self._record,
        )
        self._residuals = Residuals([known])
        self._stream, self._ends = torch.empty(0, dtype=torch.uint8), [0]

    def ranks(self) -> tuple[Tensor, Tensor]:
        """Return of each weight its rank, and of how many."""
        low, high = (_in_order(bounds) for bounds in self._bounds())
        first, last = low >> 16, high >> 16
        words = self._weights.view(torch.int16).view(*self._weights.shape, -1)[..., -1]
        own = _in_order((words.to(torch.int32) << 16).view(torch.float32)) >> 16
        if self._weights.dtype == torch.bfloat16:
            first = torch.where(low >= _MIDDLE, (low + 0xFFFF) >> 16, first)
            last = torch.where(high >= _MIDDLE, last, ((high + 1) >> 16) - 1)
        return (own - first).view(-1), (last - first + 1).clamp_min(1).view(-1)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Return the ends of the weights' intervals."""
        layout = self._layout
        *planes, scales, zeros = section_views(self._record, layout)
        codes = torch.empty(layout.rows, layout.padded_cols, dtype=torch.uint8)
        unpack_planes(
            [plane.contiguous() for plane in planes],
            PLANE_BITS[layout.precision],
            codes=codes,
            workspace=torch.empty(codes.numel(), dtype=torch.uint8),
        )
        half, zero = (
            each.float().repeat_interleave(layout.group_size, 1)[:, : layout.cols]
            for each in (scales, zeros)
        )
        place = 2.0 * codes[:, : layout.cols] - (1 << layout.bits) - 1
        return half / 2 * place + zero, half / 2 * (place + 2) + zero

    def encode(self) -> int:
        """Return the bytes of the residuals."""
        chunks = self._residuals.encode(self._payload, 0)
        self._stream, self._ends = join_chunks(chunks)
        return self._ends[-1]

    def decode(self) -> float:
        """Make the weights again, and compare them; returns the seconds of a thread."""
        out = torch.zeros_like(self._payload)
        began = time.thread_time()
        bad = self._residuals.decode(self._stream, self._ends, 0, out)
        seconds = time.thread_time() - began
        assert bad is None and torch.equal(out, self._payload)
        return seconds


def _in_order(values: Tensor) -> Tensor:
    """Return the numbers of float32 in their order, of 32 bits."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= _MIDDLE, 0xFFFFFFFF - bits, bits + _MIDDLE)


def disk_rate(folder: Path) -> float:
    """Return the GB/s of direct reads of 4 MiB, the median of five."""
    size, rates = 64 * PIECE_BYTES, []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(64):
            file.write(os.urandom(PIECE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        buffer = byte_view(aligned_buffer(PIECE_BYTES))
        try:
            for _ in range(5):
                began = time.perf_counter()
                for start in range(0, size, PIECE_BYTES):
                    os.preadv(descriptor, [buffer], start)
                rates.append(size / (time.perf_counter() - began) / GB)
        finally:
            os.close(descriptor)
    return statistics.median(rates)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure what a resident record saves of streaming its originals.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    add_model_flag(parser)
    parser.add_argument("--name", default="model", help=f"in the document {default}")
    parser.add_argument("--bf16", action="store_true", help="cast to bf16 first")
    parser.add_argument(
        "--disk", type=Path, default=Path("."), metavar="DIR", help="where the disk is measured"
    )
    parser.add_argument(
        "--rounds", type=whole_number(1), default=3, metavar="N", help=f"of decoding {default}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document here as well")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
