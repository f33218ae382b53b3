"""The compressed cache of keys and values: what it gives back, keeps, and refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor

from lib.errors import InputError
from lib.hints import Precision
from lib.precision import kv_cache
from lib.precision.codecs import Codec
from lib.precision.kv_cache import EncodedStates, LayerCodecs, cache_bytes, make_cache, round_trip

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
