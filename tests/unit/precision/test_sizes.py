import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lib.blocks import partition_model
from lib.precision.perturb import lossy_blocks
from lib.precision.sensitivity import magnitude_curves
from lib.precision.sizes import stored_sizes
from lib.vocabulary import Precision


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=80, n_positions=64)
    )


def test_bits_are_those_of_the_records() -> None:
    model = small_gpt2()
    sizes = stored_sizes(model, (Precision.INT8, Precision.INT4, Precision.INT2))
    vectors = sum(
        p.numel()
        for block in lossy_blocks(model, Precision.INT2)
        for piece in block.pieces
        for p in [model.get_parameter(piece.parameter)]
        if p.dim() == 1
    )
    assert sizes.raw_bytes == 4 * vectors
    assert sizes.num_weights + vectors == sum(sizes.num_params.values())
    plan = sizes.uniform(Precision.INT4)
    assert sizes.budget(sizes.bits_of(plan)) == pytest.approx(sizes.bytes_of(plan))
    assert sizes.bits_of(plan) < sizes.bits_of(sizes.uniform(Precision.INT8))
    total = sum(block.num_bytes for block in partition_model(model))
    lossless = 4 * sum(sizes.num_params.values())
    assert sizes.other_bytes + lossless == total


def test_blocks_may_be_left_out() -> None:
    model = small_gpt2()
    every = stored_sizes(model)
    left_out, *names = every.num_params
    some = stored_sizes(model, names=names)
    assert list(some.num_params) == names
    assert some.other_bytes == every.other_bytes + 4 * every.num_params[left_out]


def test_options_never_get_worse_with_more_bits() -> None:
    model = small_gpt2()
    sizes = stored_sizes(model)
    for choices in sizes.options(magnitude_curves(model)).values():
        assert [o.kl for o in choices] == sorted(o.kl for o in choices)
