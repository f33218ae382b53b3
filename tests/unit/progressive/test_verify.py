"""The choice of tokens: greedy, and sampled with noise that depends on nothing but its place."""

import pytest
import torch
from transformers import LogitsProcessorList, TopKLogitsWarper

from lib.progressive.verify import Chooser, score, top_gap

IDS = torch.arange(3)
LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5])


def test_the_largest_is_chosen_without_a_seed() -> None:
    token, scores = Chooser(LogitsProcessorList(), None).choose(IDS, LOGITS, sequence=0, number=0)
    assert token == 1 and torch.equal(scores, LOGITS)


def test_samples_are_of_the_softmax_and_the_same_for_the_same_place() -> None:
    chooser = Chooser(LogitsProcessorList(), 7)
    places = [(sequence, number) for sequence in range(2) for number in range(3000)]
    tokens = [chooser.choose(IDS, LOGITS, sequence=s, number=n)[0] for s, n in places]
    again = [chooser.choose(IDS, LOGITS, sequence=s, number=n)[0] for s, n in places[:100]]
    assert tokens[:100] == again
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / len(tokens)
    expected = LOGITS.softmax(0)
    assert float(((shares - expected) ** 2 / expected).sum() * len(tokens)) < 16.3  # 0.1 %, 3 d.f.
    others = [
        Chooser(LogitsProcessorList(), 8).choose(IDS, LOGITS, sequence=0, number=n)[0]
        for n in range(100)
    ]
    assert others != tokens[:100] != tokens[3000:3100]


def test_logits_that_are_close_mostly_give_the_same_sample() -> None:
    chooser = Chooser(LogitsProcessorList(), 0)
    near = LOGITS + torch.tensor([0.01, 0.0, -0.01, 0.0])
    same = [
        chooser.choose(IDS, LOGITS, sequence=0, number=n)[0]
        == chooser.choose(IDS, near, sequence=0, number=n)[0]
        for n in range(1000)
    ]
    assert sum(same) > 985


def test_processors_come_first() -> None:
    chooser = Chooser(LogitsProcessorList([TopKLogitsWarper(1)]), 3)
    assert {chooser.choose(IDS, LOGITS, sequence=0, number=n)[0] for n in range(200)} == {1}
    assert torch.equal(LOGITS, torch.tensor([0.5, 2.0, -1.0, 1.5]))  # as it was


def test_the_gap_of_the_two_largest() -> None:
    assert top_gap(LOGITS) == 0.5


def test_logits_of_a_step_are_scored_by_request() -> None:
    logits_RV = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    logits_RV[4, 7] = torch.nan
    first, none, second = score(logits_RV.bfloat16(), [3, 0, 2])
    assert (len(first), len(none), len(second)) == (3, 0, 2)
    assert first.largest == logits_RV[:3].bfloat16().argmax(-1).tolist()
    assert first.are_finite and none.are_finite and not second.are_finite
    told = first.describe(2, 5, alternatives=3)
    expected_V = logits_RV[2].bfloat16().float().log_softmax(-1)
    assert (told.id, told.logprob) == (5, pytest.approx(float(expected_V[5]), abs=1e-5))
    values, ids = expected_V.topk(3)
    assert [id for id, _ in told.top] == ids.tolist()
    assert [logprob for _, logprob in told.top] == pytest.approx(values.tolist(), abs=1e-5)
