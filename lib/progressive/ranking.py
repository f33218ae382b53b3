"""Exact top-k of many embeddings from a share of their bytes.

Embeddings lie as records of a codec whose first planes are codes of fewer bits, so a score is first
known as an interval, and no interval is ever wrong: with w an embedding, w' what a prefix decodes
to, and q the query,

    |q.w - q.w'| <= min(sum over groups g of |q_g|_1 e_g,  |q|_2 |w - w'|_2)

e_g is the codec's proven bound of a weight's error (``codecs.records``), |w - w'|_2 was measured
when the embedding was encoded. Those whose upper end is below the k-th largest lower end can't be
among the first k: only of the others are further planes read, at last the vectors as they were
given (VA-files: Weber, Schek & Blott, VLDB 1998). Nothing is left to chance: delta is 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs.layout import PARAMETER_BYTES, Codec, RecordLayout
from ..codecs.records import (
    add_groups,
    decode_parameters,
    encode,
    scale_codes,
    section_views,
)
from ..errors import InputError
from ..vocabulary import Precision

LADDER = (Precision.INT4, Precision.INT6, Precision.INT8)
_SHARD_ROWS = 1024
"""Rows scored at a time: what they decode to stays in a processor's caches."""
_NORM_BYTES = 4
_ROUNDING = 2.0**-36
"""Of the sum of magnitudes: more than adding up 2**16 numbers in float64 can cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRead:
    """What one tier came to."""

    tier: str
    """A precision, or ``original``."""
    candidates: int
    """Embeddings that it was read of."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The first k, exactly: those that scoring all of the originals would give."""

    indices: Tensor
    """(k,) int64: the largest score first, of equal ones the lowest index."""
    scores: Tensor
    """(k,) float64: products with the query in fp32."""
    reads: tuple[TierRead, ...]
    full_bytes: int
    """Bytes of all originals: what is read without planes."""

    @property
    def num_bytes(self) -> int:
        """Bytes read."""
        return sum(read.num_bytes for read in self.reads)

    @property
    def share(self) -> float:
        """Bytes read over ``full_bytes``."""
        return self.num_bytes / self.full_bytes


def brute_force(vectors_ND: Tensor, query_D: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return indices and scores (k,) of the first k, by reading all: what a search must equal."""
    query = query_D.float().double()
    scores_N = _score(query, vectors_ND, torch.arange(len(vectors_ND)))
    best = _top_k(scores_N, k)
    return best, scores_N[best]


def _score(query_D: Tensor, vectors_ND: Tensor, indices: Tensor) -> Tensor:
    """Return products (n,) in float64, added up by halves: torch's own order depends on how many
    rows there are, and a subset must score as the whole does.
    """
    scores = []
    for rows in _shards(indices):
        products_nD = vectors_ND[rows].double() * query_D
        while products_nD.shape[1] > 1:
            half = (products_nD.shape[1] + 1) // 2
            rest = products_nD[:, half:]
            products_nD = products_nD[:, :half].clone()
            products_nD[:, : rest.shape[1]] += rest
        scores.append(products_nD[:, 0])
    return torch.cat(scores)


def _shards(indices: Tensor) -> list[Tensor]:
    return [indices[start : start + _SHARD_ROWS] for start in range(0, len(indices), _SHARD_ROWS)]


def _top_k(scores_N: Tensor, k: int) -> Tensor:
    """Return the places of the k largest, the largest first, of equal ones the lowest place."""
    return torch.sort(scores_N, descending=True, stable=True).indices[:k]


class NestedEmbeddings:
    """Embeddings (N, D) as nested planes, with the originals below.

    ``originals`` are only read, a few rows at a time: they may be mapped from a file. Raises
    InputError for what the codec can't store (``codecs.records.encode``).
    """

    def __init__(self, originals: Tensor, *, group_size: int = 0) -> None:
        codec = Codec(LADDER[-1], group_size)
        self._originals = originals
        self._record = encode(originals, codec)
        whole = codec.layout(*originals.shape)
        self._layouts = tuple(whole.prefix(precision) for precision in LADDER)
        self._residuals = [self._measure_residuals(layout) for layout in self._layouts]

    @property
    def num_bytes(self) -> int:
        """Bytes of the planes with their scales, zeros and residuals, without the originals."""
        return self._record.nbytes + sum(norms.nbytes for norms in self._residuals)

    def search(self, query_D: Tensor, k: int) -> Ranked:
        """Return the k embeddings with the largest products with a query (D,).

        Raises InputError for a query of another size or that isn't finite, and for k outside 1 to
        N.
        """
        rows, cols = self._originals.shape
        query = query_D.float().double()
        if query_D.shape != (cols,) or not query.isfinite().all():
            raise InputError(
                f"query of shape {tuple(query_D.shape)}: give {cols} finite fp32 numbers, as "
                "embeddings have"
            )
        if not 1 <= k <= rows:
            raise InputError(f"k is {k}: of {rows} embeddings give 1 to {rows}")
        left = torch.arange(rows)
        lower = torch.full((rows,), -torch.inf, dtype=torch.float64)
        upper = -lower
        reads = []
        for tier, layout in enumerate(self._layouts):
            if len(left) == k:
                break
            row_bytes = layout.planes[-1].row_bytes + _NORM_BYTES
            row_bytes += 0 if tier else 2 * layout.num_groups * PARAMETER_BYTES
            low, high = self._intervals(query, tier, left)
            lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
            reads.append(
                TierRead(
                    tier=str(layout.precision),
                    candidates=len(left),
                    num_bytes=len(left) * row_bytes,
                )
            )
            keep = upper >= lower.topk(k).values[-1]
            left, lower, upper = left[keep], lower[keep], upper[keep]
        scores = _score(query, self._originals, left)
        row_bytes = cols * self._originals.element_size()
        reads.append(
            TierRead(tier="original", candidates=len(left), num_bytes=len(left) * row_bytes)
        )
        best = _top_k(scores, k)
        return Ranked(
            indices=left[best],
            scores=scores[best],
            reads=tuple(reads),
            full_bytes=rows * row_bytes,
        )

    def _intervals(self, query_D: Tensor, tier: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of the scores (n,), float64, as this tier's planes tell them."""
        layout = self._layouts[tier]
        size, groups = layout.group_size, layout.num_groups
        padded = torch.nn.functional.pad(query_D.abs(), (0, groups * size - len(query_D)))
        sums_G = padded.view(groups, size).sum(1)
        ends = []
        for part in _shards(indices):
            values_nD, errors_nG, most_nG = self._decode(layout, part)
            by_groups = errors_nG @ sums_G
            by_length = self._residuals[tier][part].double() * query_D.norm()
            error = torch.minimum(by_groups, by_length) + _ROUNDING * (most_nG @ sums_G)
            middle = values_nD.double() @ query_D
            ends.append(torch.stack([middle - error, middle + error]))
        low, high = torch.cat(ends, dim=1)
        return low, high

    def _decode(self, layout: RecordLayout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decode rows by index: values (n, D); of each group the bound of their errors, and of the
        magnitude of an original, (n, groups), float64.
        """
        *planes, scales, zeros = (part[rows] for part in section_views(self._record, layout))
        blank = torch.empty_like(scales, dtype=torch.float32)
        scale, low = decode_parameters(scales, zeros, layout, out=(blank, blank.clone()))
        codes = self._record.new_empty(len(rows), layout.padded_cols)
        values = torch.empty(len(rows), layout.cols)
        scale_codes(planes, scale, layout, codes=codes, out=values)
        add_groups(values, low, layout)
        steps = scale.double()
        most = low.double().abs() + steps * (1 << layout.bits)
        return values, steps / 2 * (1 + 2.0**-14) + 2.0**-22 * most, most

    def _measure_residuals(self, layout: RecordLayout) -> Tensor:
        """Return |w - w'|_2 of each row (N,), fp32, rounded up."""
        norms = []
        for rows in _shards(torch.arange(layout.rows)):
            values, _, _ = self._decode(layout, rows)
            norms.append((self._originals[rows].double() - values.double()).norm(dim=1))
        exact = torch.cat(norms)
        return (exact * (1 + 2.0**-20) + 2.0**-126).float()
