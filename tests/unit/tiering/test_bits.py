"""Lossless means bits: products of weights that are away are the untouched model's, whatever the
shape, the strides and the flags of what comes in.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_gpt2
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lib.blocks import partition_model
from lib.tiering import attach
from lib.tiering.payload import layout as payload
from lib.tiering.payload.groups import group_blocks

pytestmark = pytest.mark.filterwarnings("ignore:flat hints")

WIDTH = 64
INPUTS: dict[str, Callable[[int], Tensor]] = {
    "rows": lambda n: torch.randn(n, WIDTH),
    "one row": lambda n: torch.randn(WIDTH),
    "a batch": lambda n: torch.randn(n, 9, WIDTH),
    "the last position": lambda n: torch.randn(n, 9, WIDTH)[:, -1:],
    "every other position": lambda n: torch.randn(n, 9, WIDTH)[:, ::2],
    "transposed": lambda n: torch.randn(9, n, WIDTH).transpose(0, 1),
    "expanded": lambda n: torch.randn(1, 5, WIDTH).expand(n, 5, WIDTH),
    "columns of a wider one": lambda n: torch.randn(n, 3, 2 * WIDTH)[..., WIDTH:],
    "four dimensions": lambda n: torch.randn(n, 2, 3, WIDTH).transpose(1, 2),
    "no rows": lambda n: torch.randn(n, 0, WIDTH),
}


def _tied(bias: bool) -> nn.Module:
    head = nn.Linear(WIDTH, 777, bias=bias)
    embed = nn.Embedding(777, WIDTH)
    embed.weight = head.weight
    return nn.ModuleDict({"embed": embed, "head": head})


MODULES: dict[str, Callable[[bool], nn.Module]] = {
    "head of one shard": lambda bias: nn.Linear(WIDTH, 250, bias=bias),
    "head of shards": lambda bias: nn.Linear(WIDTH, 777, bias=bias),
    "tied head": _tied,
    "Conv1D": lambda bias: Conv1D(777, WIDTH),
}


def _away(model: nn.Module) -> dict[str, str]:
    return {block.name: "SSD" for block in partition_model(model)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "_PART_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_products_of_weights_that_are_away_have_the_bits_of_the_whole_ones(
    kind: str, trainable: bool, bias: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = MODULES[kind](bias).to(dtype).requires_grad_(trainable)
    head = model["head"] if isinstance(model, nn.ModuleDict) else model
    inputs = {(name, n): make(n).to(dtype) for name, make in INPUTS.items() for n in (1, 2, 3, 4)}
    if kind == "Conv1D":  # it can't do the others itself
        inputs = {key: x for key, x in inputs.items() if x.is_contiguous() and x.numel()}
    wrong = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = {key: head(x) for key, x in inputs.items()}
            with attach(model, _away(model), spill_dir=tmp_path):
                for key, x in inputs.items():
                    y = head(x)
                    assert y.stride() == expected[key].stride()
                    if not torch.equal(y, expected[key]):
                        wrong.append((key, mode))
    assert not wrong


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 511, 512, 513, 767, 1023, 1025])
@pytest.mark.parametrize("part_bytes", [1, 2 * 256 * WIDTH * 4, 3 * 256 * WIDTH * 4])
def test_no_shard_has_fewer_rows_than_products_need_for_their_bits(
    rows: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payload, "_PART_BYTES", part_bytes)
    model = nn.Linear(WIDTH, rows, bias=False)
    (group,) = group_blocks(model, partition_model(model))
    shards = payload.make_payload(group, model, dict(model.named_parameters()), None).shards
    assert [shard.start for shard in shards[1:]] == [shard.end for shard in shards[:-1]]
    assert (shards[0].start, shards[-1].end) == (0, rows)
    if len(shards) > 1:
        assert min(shard.end - shard.start for shard in shards) >= 256
        assert all(shard.start % 256 == 0 for shard in shards)
    assert max(shard.end - shard.start for shard in shards) <= max(part_bytes // (WIDTH * 4), 511)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_of_a_generation_has_the_untouched_model_s_logits(
    dtype: torch.dtype, batch: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tiny_gpt2().to(dtype).eval()
    ids = torch.arange(5 * batch).reshape(batch, 5) % 32

    def logits() -> tuple[Tensor, ...]:
        result = model.generate(
            ids,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return result.logits

    expected = logits()
    with attach(model, _away(model), spill_dir=tmp_path):
        for here, there in zip(logits(), expected, strict=True):
            assert torch.equal(here, there)
