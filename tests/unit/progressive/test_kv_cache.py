"""The compressed cache of keys and values: what it gives back, keeps, and refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lib.codecs.records import Codec
from lib.errors import InputError
from lib.progressive import kv_cache
from lib.progressive.kv_cache import (
    EncodedLayer,
    EncodedStates,
    LayerCodecs,
    cache_bytes,
    make_cache,
    round_trip,
)
from lib.vocabulary import Precision

INT8, INT4, INT2 = (Codec(p) for p in (Precision.INT8, Precision.INT4, Precision.INT2))
IDS = torch.randint(40, (3, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def short_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "RECORD_TOKENS", 8)


def feed(model: Any, codecs: list[LayerCodecs], sizes: list[int]) -> tuple[Tensor, Any]:
    cache = make_cache(codecs)
    with torch.no_grad():
        logits = [
            model(input_ids=piece, past_key_values=cache, use_cache=True).logits
            for piece in IDS.split(sizes, dim=1)
        ]
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_llama])
def test_pieces_do_not_change_the_logits(make_model: Callable[[], Any]) -> None:
    model = make_model().eval()
    codecs: list[LayerCodecs] = [(INT8, INT4), INT2]
    whole, cache = feed(model, codecs, [30])
    pieces, other = feed(model, codecs, [1, 9, 3, 16, 1])
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == other.get_seq_length() == 30
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
    kept, _ = feed(model, [None, None], [7, 23])
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, plain, rtol=1e-3, atol=1e-4)  # it really was read


def test_fewer_bits_are_fewer_bytes_and_more_error() -> None:
    model = tiny_llama().eval()
    plain, cache = feed(model, [None, None], [24, 6])
    assert cache_bytes(cache) == 2 * 2 * IDS.numel() * 2 * 8 * 4  # layers, sides, heads, dim, fp32
    sizes, errors = [], []
    for codec in (INT8, INT4, INT2):
        logits, cache = feed(model, [codec, codec], [24, 6])
        sizes.append(cache_bytes(cache))
        errors.append(float((logits - plain).square().mean()))
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)


def test_generation_reads_the_cache() -> None:
    model = tiny_llama().eval()
    start = IDS[:, :9]
    plain = model.generate(start, max_new_tokens=12, do_sample=False)
    kept = model.generate(
        start, max_new_tokens=12, do_sample=False, past_key_values=make_cache([None, None])
    )
    assert torch.equal(plain, kept)
    cache = make_cache([INT4, INT4])
    model.generate(start, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 9 + 12 - 1
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


def test_states_come_back_within_half_a_step_and_records_stay() -> None:
    states = torch.randn(2, 3, 20, 32, generator=torch.Generator().manual_seed(1))
    step = (states.amax(-1) - states.amin(-1)) / 15
    error = (round_trip(states, INT4) - states).abs().amax(-1)
    assert (error <= 0.52 * step).all()
    stored = EncodedStates(INT4)
    first = stored.append(states[..., :11, :])
    both = stored.append(states[..., 11:, :])
    assert torch.equal(both[..., :11, :], first)
    assert torch.equal(both, round_trip(states, INT4))


def test_beam_search_is_refused() -> None:
    with pytest.raises(InputError, match="num_beams=1"):
        make_cache([INT4]).reorder_cache(torch.tensor([0]))


class PlainLayer:
    """A ``DynamicLayer`` that is given each state as the codec gives it back."""

    def __init__(self, codecs: tuple[Codec | None, Codec | None]) -> None:
        self.codecs = codecs
        self.layer = DynamicLayer()

    def update(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(states, self.codecs, strict=True)
        return self.layer.update(*(s if c is None else round_trip(s, c) for s, c in pairs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 20)),
        st.tuples(st.just("crop"), st.integers(0, 25)),
        st.tuples(st.just("select"), st.lists(st.integers(-1, 1), min_size=1, max_size=3)),
        st.tuples(st.just("mask"), st.integers(0, 3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("deepcopy"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(
    operations=OPERATIONS,
    codecs=st.tuples(*[st.sampled_from([None, INT8, INT4, INT2, Codec(Precision.BF16)])] * 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_operation_does_what_a_plain_cache_does(
    operations: list[tuple[str, Any]],
    codecs: tuple[Codec | None, Codec | None],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    ours: Any = EncodedLayer(codecs)
    plain: Any = PlainLayer(codecs)
    batch = 2
    for operation, value in [("update", 11), *operations, ("update", 1)]:
        held = plain.get_seq_length()
        batch = plain.layer.keys.shape[0] if held else max(batch, 2)
        if operation == "update":
            size = (batch, 2, value, 16)
            states = [torch.randn(size, generator=generator).to(dtype) for _ in "kv"]
            for mine, theirs in zip(ours.update(*states), plain.update(*states), strict=True):
                assert torch.equal(mine, theirs)
        elif operation == "crop":
            ours.crop(torch.tensor(-value) if value % 2 else -value)
            if held:
                plain.crop(-value)
            if not plain.get_seq_length():  # which keeps the shape of its empty tensors
                plain = PlainLayer(codecs)
        elif operation == "repeat":
            if batch <= 4:
                ours.batch_repeat_interleave(value)
                plain.batch_repeat_interleave(value)
        elif operation in ("select", "mask"):
            index = torch.tensor(value) if operation == "select" else torch.arange(batch) != value
            if operation == "mask" and (batch == 1 or not index.any()):
                continue
            index = index.clamp(-batch, batch - 1) if operation == "select" else index
            ours.batch_select_indices(index)
            plain.batch_select_indices(index)
        elif operation == "deepcopy":
            ours = copy.deepcopy(ours)
        else:
            ours.reset()
            plain = PlainLayer(codecs)
        assert ours.get_seq_length() == plain.get_seq_length()
        assert ours.get_mask_sizes(3) == plain.get_mask_sizes(3)
        assert ours.get_max_length() == plain.get_max_length()


@pytest.mark.parametrize("codec", [None, INT8, INT2])
def test_what_is_taken_away_takes_no_memory(codec: Codec | None) -> None:
    stored = EncodedStates(codec)
    states = torch.randn(2, 2, 21, 32, generator=torch.Generator().manual_seed(0))
    sizes = []
    for length in (3, 13, 21):
        once = EncodedStates(codec)
        once.append(states[..., :length, :])
        sizes.append(once.num_bytes)
    stored.append(states)
    for length, size in ((13, sizes[1]), (3, sizes[0])):
        stored.crop(stored.length - length)
        assert stored.length == length
        assert stored.num_bytes <= size * 1.6, "records of rows that are gone are still held"
    stored.crop(99)
    assert (stored.length, stored.num_bytes) == (0, 0)


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("codec", [None, INT8, INT4])
def test_generation_that_takes_tokens_back_gives_the_same_tokens(
    make_model: Callable[[], Any], way: str, codec: Codec | None
) -> None:
    model = make_model().eval()
    prompt = torch.arange(1, 8).repeat(2)[None]
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False}
    expected = model.generate(prompt, past_key_values=make_cache([codec] * 2), **options)
    if way == "prompt lookup":
        options["prompt_lookup_num_tokens"] = 3
    else:
        options["assistant_model"] = make_model().eval()
    cache = make_cache([codec] * 2)
    found = model.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() <= found.shape[1]


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("given_codecs", [0, 1])
def test_too_few_codecs_are_named(make_model: Callable[[], Any], given_codecs: int) -> None:
    model = make_model().eval()
    with pytest.raises(
        InputError, match=f"layer {given_codecs} .* no codec: .* given {given_codecs}, .*"
    ):
        model.generate(IDS, max_new_tokens=2, past_key_values=make_cache([INT8] * given_codecs))


def test_states_that_cannot_be_stored_name_their_layer() -> None:
    cache = make_cache([INT8, INT4])
    states = torch.randn(1, 2, 9, 32)
    cache.update(states, states, 0)
    with pytest.raises(InputError, match="keys or values of layer 1: .*NaN"):
        cache.update(states, states * float("nan"), 1)


def test_a_positive_crop_and_beams_are_refused() -> None:
    with pytest.raises(InputError, match=r"crop\(5\): .*negative"):
        make_cache([INT8]).crop(5)
    model = tiny_llama().eval()
    with pytest.raises(InputError, match="num_beams=1"):
        model.generate(IDS, max_new_tokens=3, num_beams=2, past_key_values=make_cache([INT8] * 2))
