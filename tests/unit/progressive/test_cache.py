"""The cache that crops: as a plain one, whatever is done to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama
from torch import Tensor
from transformers import DynamicCache

from lib.errors import InputError
from lib.progressive.cache import SMALLEST, CroppableCache, Masks

HEADS, DIM, LAYERS = 2, 3, 2
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 3)),
        st.tuples(st.just("reorder"), st.integers(0, 3)),
    ),
    max_size=12,
)


def contents(cache: CroppableCache, layer: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values that count, of sequences of the same length."""
    held, length = cache.layers[layer], int(cache.lengths[0])
    return held.keys[:, :, :length], held.values[:, :, :length]  # type: ignore[union-attr]


@settings(max_examples=60)
@given(STEPS, st.integers(1, 3))
def test_it_holds_what_a_plain_cache_holds(steps: list[tuple[str, int]], batch: int) -> None:
    plain, cropped = DynamicCache(), CroppableCache(LAYERS, 12 * 9)
    generator = torch.Generator().manual_seed(0)
    length = 0
    for what, number in [("update", 1), *steps]:
        if what == "update":
            for layer in range(LAYERS):
                shape = (batch, HEADS, number, DIM)
                keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
                plain.update(keys, values, layer)
                cropped.update(keys, values, layer)
            length += number
        elif what == "crop":
            count = min(number, length - 1)
            plain.crop(-count)
            cropped.crop(-count)
            length -= count
        elif what == "repeat" and batch * number <= 6:
            plain.batch_repeat_interleave(number)
            cropped.batch_repeat_interleave(number)
            batch *= number
        elif what == "select":
            indices = torch.arange(batch)[number % batch :]
            plain.batch_select_indices(indices)
            cropped.batch_select_indices(indices)
            batch = len(indices)
        elif what == "reorder":
            order = (torch.arange(batch) + number) % batch
            plain.reorder_cache(order)
            cropped.reorder_cache(order)
        assert int(cropped.get_seq_length()) == plain.get_seq_length() == length
        for layer in range(LAYERS):
            keys, values = contents(cropped, layer)
            assert torch.equal(keys, plain.layers[layer].keys)
            assert torch.equal(values, plain.layers[layer].values)


def test_each_sequence_gives_back_its_own_number_of_tokens() -> None:
    cache = CroppableCache(1, 10)
    states = torch.arange(2 * 8.0).view(2, 1, 8, 1)
    cache.update(states, states, 0)
    cache.take_back(torch.tensor([1, 5]))
    assert cache.lengths.tolist() == [7, 3]
    keys, _ = cache.update(torch.full((2, 1, 2, 1), -1.0), torch.zeros(2, 1, 2, 1), 0)
    assert keys[0, 0, :9, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1]
    assert keys[1, 0, :5, 0].tolist() == [8, 9, 10, -1, -1]


@pytest.mark.parametrize("count", [1, -9])
def test_tokens_that_are_not_there_cannot_be_taken_back(count: int) -> None:
    cache = CroppableCache(1, 10)
    cache.crop(-3)  # nothing is held yet
    cache.update(torch.zeros(1, 1, 8, 1), torch.zeros(1, 1, 8, 1), 0)
    with pytest.raises(InputError, match="negative number"):
        cache.crop(count)


def test_memory_stays_where_it_is() -> None:
    rooms = [CroppableCache(1, tokens).room for tokens in (1, 256, 257, 385, 513, 769)]
    assert rooms == [256, 256, 384, 512, 768, 1024]
    cache = CroppableCache(1, SMALLEST)
    keys, _ = cache.update(torch.zeros(1, 1, 8, 1), torch.zeros(1, 1, 8, 1), 0)
    cache.crop(-2)
    again, _ = cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    assert again.data_ptr() == keys.data_ptr() and again.shape[2] == cache.room
    cache.reset()
    assert cache.get_seq_length() == 0


def test_generation_reads_it() -> None:
    model = tiny_llama().eval()
    ids = torch.arange(1, 9).view(1, -1)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    cache = CroppableCache(model.config.num_hidden_layers, 20)
    assert torch.equal(
        model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache), plain
    )


def test_masks_of_windows_and_padding() -> None:
    config = tiny_llama().config
    seen = Masks(config, 8, [0, 2], torch.device("cpu")).make(
        torch.tensor([3, 5]), 2, torch.float32
    )
    assert seen.shape == (2, 1, 2, 8)
    assert seen[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert seen[1, 0].int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0]]
    config.layer_types = ["full_attention", "sliding_attention"]
    config.sliding_window = 2
    made = Masks(config, 8, [0], torch.device("cpu")).make(torch.tensor([3]), 1, torch.float32)
    assert made.keys() == {"full_attention", "sliding_attention"}
    assert made["sliding_attention"][0, 0, 0].int().tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_masks_refuse_what_they_do_not_know() -> None:
    config = tiny_llama().config
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(InputError, match="linear_attention"):
        Masks(config, 8, [0], torch.device("cpu"))
    config = tiny_llama().config
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2"):
        Masks(config, 8, [0], torch.device("cpu"))


def test_a_copy_goes_its_own_way_and_takes_tokens_over() -> None:
    cache = CroppableCache(LAYERS, 300)
    for layer in range(LAYERS):
        cache.update(torch.randn(2, HEADS, 6, DIM), torch.randn(2, HEADS, 6, DIM), layer)
    copied = cache.copy()
    assert copied.room == cache.room
    before = contents(cache, 0)[0].clone()
    for layer in range(LAYERS):  # a draft's, and a pass's
        copied.update(torch.randn(2, HEADS, 4, DIM), torch.randn(2, HEADS, 4, DIM), layer)
        cache.update(torch.randn(2, HEADS, 5, DIM), torch.randn(2, HEADS, 5, DIM), layer)
    assert torch.equal(contents(copied, 0)[0][:, :, :6], before)
    own = contents(copied, 1)[1].clone()
    cache.take_back(torch.tensor([2, 3]))
    copied.copy_tokens(cache, torch.tensor([6, 5]), 3)
    for layer in range(LAYERS):
        for ours, theirs in zip(contents(copied, layer), contents(cache, layer), strict=True):
            assert torch.equal(ours[0, :, :9], theirs[0, :, :9])
            assert torch.equal(ours[1, :, 5:8], theirs[1, :, 5:8])
    assert torch.equal(contents(copied, 1)[1][0, :, 9:], own[0, :, 9:])
    assert copied.lengths.tolist() == [10, 10]
    copied.end_with(cache, torch.tensor([False, True]))
    assert copied.lengths.tolist() == [10, 8]
    copied.end_with(cache, torch.tensor([True, True]))
    assert copied.lengths.tolist() == cache.lengths.tolist() == [9, 8]


def test_a_layer_without_tokens_of_its_own_is_copied_as_such() -> None:
    cache, states = CroppableCache(2, 10), torch.randn(1, 1, 3, 2)
    cache.update(states, states, 0)
    copied = cache.copy()
    cache.update(states, states, 0)
    copied.copy_tokens(cache, torch.tensor([3]), 3)
    copied.end_with(cache, torch.tensor([True]))
    assert torch.equal(copied._own[0].keys, cache._own[0].keys)
    assert copied.lengths.item() == 6 and not copied._own[1].is_initialized
