"""Top-k from nested planes: always what reading everything gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.progressive.ranking import NestedEmbeddings, brute_force


def _vectors(rows: int, cols: int, seed: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, cols, generator=generator)
    if kind == "twins":  # many equal scores
        vectors = vectors[torch.randint(max(1, rows // 8), (rows,), generator=generator)]
    if kind == "outliers":
        vectors[:, 0] *= 1000
    if kind == "tiny":
        vectors *= 1e-30
    if kind == "near":  # scores differ by less than any plane tells
        vectors = vectors[:1] + 1e-5 * vectors
    return vectors


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 130),
    k=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["plain", "twins", "outliers", "tiny", "near"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    group_size=st.sampled_from([0, 32, 64]),
)
def test_a_search_equals_brute_force(
    rows: int, cols: int, k: int, seed: int, kind: str, dtype: torch.dtype, group_size: int
) -> None:
    vectors = _vectors(rows + 1, cols, seed, kind)
    if kind == "outliers":
        vectors = vectors.clamp(-6e4, 6e4)
    originals, query = vectors[:rows].to(dtype), vectors[rows]
    k = min(k, rows)
    ranked = NestedEmbeddings(originals, group_size=group_size).search(query, k)
    indices, scores = brute_force(originals, query, k)
    assert ranked.indices.tolist() == indices.tolist()
    assert ranked.scores.tolist() == scores.tolist()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["plain", "twins", "outliers", "tiny", "near"]),
    group_size=st.sampled_from([0, 32]),
)
def test_no_interval_is_wrong(seed: int, kind: str, group_size: int) -> None:
    vectors = _vectors(64, 48, seed, kind)
    query = vectors[0].double()
    embeddings = NestedEmbeddings(vectors, group_size=group_size)
    exact = vectors.double() @ query
    slack = 1e-12 * exact.abs().max()
    widths = []
    for tier in range(3):
        low, high = embeddings._intervals(query, tier, torch.arange(64))
        assert bool((low <= exact + slack).all() and (exact <= high + slack).all())
        widths.append(float((high - low).mean()))
    assert widths == sorted(widths, reverse=True)


def test_few_bytes_are_read_where_few_are_close() -> None:
    vectors = torch.nn.functional.normalize(_vectors(4000, 384, 0, "plain"), dim=-1)
    query = vectors[7] + 0.02 * _vectors(1, 384, 1, "plain")[0]
    ranked = NestedEmbeddings(vectors).search(query, 1)
    assert ranked.indices.tolist() == [7]
    assert [read.tier for read in ranked.reads] == ["int4", "original"]
    assert ranked.reads[0].candidates == 4000
    assert ranked.full_bytes == vectors.nbytes
    assert ranked.share == ranked.num_bytes / ranked.full_bytes < 0.14


def test_bad_queries_are_refused() -> None:
    embeddings = NestedEmbeddings(torch.randn(5, 8))
    with pytest.raises(InputError, match="give 8 finite fp32 numbers"):
        embeddings.search(torch.randn(7), 1)
    with pytest.raises(InputError, match="give 8 finite fp32 numbers"):
        embeddings.search(torch.full((8,), torch.nan), 1)
    for k in (0, 6):
        with pytest.raises(InputError, match="give 1 to 5"):
            embeddings.search(torch.randn(8), k)
