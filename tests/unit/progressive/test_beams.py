"""Beam search with a certificate, against all texts there are."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lib.errors import InputError
from lib.progressive.beams import BeamResult, CausalScorer, search


class Table:
    """A model by hand: the chances of the next token by the text so far."""

    def __init__(self, chances: Mapping[tuple[int, ...], Sequence[float]]) -> None:
        self._chances = chances
        self._texts: list[tuple[int, ...]] = []

    def start(self, prompt: Sequence[int]) -> Tensor:
        self._texts = [()]
        return self._read()[0]

    def advance(self, parents_B: Tensor, tokens_B: Tensor) -> Tensor:
        pairs = zip(parents_B.tolist(), tokens_B.tolist(), strict=True)
        self._texts = [(*self._texts[parent], token) for parent, token in pairs]
        return self._read()

    def _read(self) -> Tensor:
        rows = [self._chances[text] for text in self._texts]
        return torch.tensor(rows, dtype=torch.float64).log()


def _most_probable(table: Table, vocabulary: int, length: int) -> float:
    """Return the largest log-probability of texts that end with 0, or have the full length."""
    best = -torch.inf
    for text in itertools.product(range(vocabulary), repeat=length):
        score = float(table.start([9])[text[0]])
        for before, token in itertools.pairwise(text):
            if before == 0:
                break
            score += float(table.advance(torch.tensor([0]), torch.tensor([before]))[0, token])
        best = max(best, score)
    return best


def _search(table: Any, width: int, length: int = 3) -> BeamResult:
    return search(table, [9], max_new_tokens=length, end_ids=frozenset({0}), widths=[width])


GAP = Table(
    {
        (): [0.0, 0.5, 0.3, 0.2],
        (1,): [0.3, 0.24, 0.23, 0.23],
        (2,): [0.01, 0.33, 0.33, 0.33],
        (3,): [1.0, 0.0, 0.0, 0.0],
        **{(first, second): [0.25] * 4 for first in (1, 2) for second in (1, 2, 3)},
    }
)
"""Texts of up to three tokens; 0 ends them. A beam of two keeps 1 and 2, and finds ``1 0`` of 0.15,
far ahead of all others that it sees; what it pruned goes on to ``3 0`` of 0.2.
"""


def test_a_gap_is_no_certificate() -> None:
    narrow = _search(GAP, 2)
    assert narrow.tokens == (1, 0)
    assert narrow.log_probability == pytest.approx(torch.tensor(0.15).log().item())
    best_others = 0.5 * 0.24 * 0.25  # the best of what else this beam sees: a gap of 1.6 nats
    assert narrow.log_probability - torch.tensor(best_others).log().item() > 1.6
    assert not narrow.certified
    assert narrow.rest == pytest.approx(torch.tensor(0.2).log().item())
    wide = _search(GAP, 3)
    assert wide.tokens == (3, 0)
    assert wide.certified


def test_the_beam_is_widened_until_certified() -> None:
    found = search(GAP, [9], max_new_tokens=3, end_ids=frozenset({0}), widths=[1, 2, 3, 4])
    assert (found.tokens, found.certified, found.width, found.escalations) == ((3, 0), True, 3, 2)
    limited = search(GAP, [9], max_new_tokens=3, end_ids=frozenset({0}), widths=[1, 2])
    assert (limited.tokens, limited.certified, limited.width) == ((1, 0), False, 2)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), vocabulary=st.integers(2, 4), length=st.integers(1, 4), width=st.integers(1, 5)
)
def test_certified_texts_are_the_most_probable(
    data: st.DataObject, vocabulary: int, length: int, width: int
) -> None:
    seed, sharpness = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.3, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(seed)
    table = Table(
        {
            text: (sharpness * torch.randn(vocabulary, generator=generator)).softmax(0).tolist()
            for size in range(length)
            for text in itertools.product(range(vocabulary), repeat=size)
        }
    )
    found = _search(table, width, length)
    best = _most_probable(table, vocabulary, length)
    assert found.log_probability <= best + 1e-12
    assert best <= max(found.log_probability, found.rest) + 1e-12
    if found.certified:
        assert found.log_probability == pytest.approx(best, abs=1e-12)
    if width >= vocabulary**length:
        assert found.certified


def test_a_causal_model_is_searched_with_its_cache() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=6, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    found = search(CausalScorer(model), [1, 2, 3], max_new_tokens=3, widths=[1, 4, 36])
    texts = torch.tensor([[1, 2, 3, *text] for text in itertools.product(range(6), repeat=3)])
    with torch.inference_mode():
        log_probs = model(texts).logits.double().log_softmax(-1)[:, 2:5]
    scores = log_probs.gather(2, texts[:, 3:, None]).sum((1, 2))
    assert found.certified
    assert list(found.tokens) == texts[scores.argmax(), 3:].tolist()
    assert found.log_probability == pytest.approx(float(scores.max()), abs=1e-5)


def test_bad_searches_are_refused() -> None:
    with pytest.raises(InputError, match="1 or more of each"):
        search(GAP, [], max_new_tokens=3)
    with pytest.raises(InputError, match="rising, from 1"):
        search(GAP, [9], max_new_tokens=3, widths=[2, 2])
