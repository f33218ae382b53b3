"""How often a model chooses what its compressed copy does."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

from lib.evaluation.acceptance import measure_acceptance
from lib.progressive.division import predict_acceptance
from lib.tiering import load
from lib.vocabulary import Precision


def test_more_bits_agree_more_often(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    prompts = torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(0))
    wanted = (Precision.INT8, Precision.INT4, Precision.INT2)
    found = measure_acceptance(load(tmp_path), tmp_path, prompts, precisions=wanted, new_tokens=20)
    assert list(found) == list(wanted)
    eight, four, two = found.values()
    assert 1 >= eight.greedy > 0.9 and eight.greedy >= four.greedy > two.greedy
    assert eight.sampled > four.sampled > two.sampled > 0
    assert eight.kl_nats < four.kl_nats < two.kl_nats
    assert {each.predicted for each in found.values()} == {None}  # there are no hints
    # Made for text of another model, the prediction is of the right size all the same.
    assert eight.sampled == pytest.approx(predict_acceptance(eight.kl_nats), abs=0.05)


def test_predicted_acceptance_falls_from_one() -> None:
    shares = [predict_acceptance(nats) for nats in (0.0, 1e-4, 1e-2, 1.0, 100.0)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] > 0
    assert predict_acceptance(0.005) == pytest.approx(0.9564, abs=1e-3)
