"""What fast memory knows of weights that stream as they are: their records, which a draft has."""

from collections.abc import Iterator, Mapping

import xxhash
from torch import Tensor

from ...codecs.layout import RecordLayout
from ...codecs.residuals import DTYPES, KnownRows, Residuals
from .layout import Payload
from .parts import Part


class KnownWeights:
    """Records by parameter, for as long as they are in fast memory and don't change."""

    def __init__(self, records: Mapping[str, tuple[RecordLayout, Tensor]]) -> None:
        self._records = records
        self._keys: dict[str, str] = {}
        self._residuals: dict[str, Residuals] = {}

    def key(self, key: str, payload: Payload) -> str:
        """Return the key of a payload as it is coded: that of its content, and of the records."""
        if key not in self._keys:
            self._keys[key] = key
            if rows := list(self._rows(payload)):
                how = Residuals(rows)
                self._keys[key] = xxhash.xxh3_128_hexdigest(f"{key} {how.identity}".encode())
                self._residuals[self._keys[key]] = how
        return self._keys[key]

    def find(self, key: str) -> Residuals | None:
        """Return how a payload is coded; None: as it is."""
        return self._residuals.get(key)

    def _rows(self, payload: Payload) -> Iterator[KnownRows]:
        for part in payload.parts:
            found = self._records.get(part.parameter)
            if found is None or not is_coded(part, found[0]):
                continue
            places = [(part.offset, 0, part.rows)]
            if payload.by_rows:
                places = [(shard.offset, shard.start, shard.end) for shard in payload.shards]
            for offset, start, end in places:
                yield KnownRows(
                    offset=offset,
                    start=start,
                    end=end,
                    dtype=part.dtype,
                    layout=found[0],
                    record=found[1],
                )


def is_coded(part: Part, layout: RecordLayout) -> bool:
    """Say whether a part as it is can be made again of a record of this layout, and a residual."""
    return (
        part.codec is None
        and part.expert is None
        and part.dtype in DTYPES
        and len(part.shape) == 2
        and part.is_contiguous
        and not layout.codec.is_raw
        and layout.precision is layout.codec.precision
        and (layout.rows, layout.cols) == tuple(part.shape)
    )
