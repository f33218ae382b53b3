import pytest
import torch
from tiny_models import tiny_gpt2, tiny_mixtral
from torch import Tensor, nn

from lib.blocks import (
    BlockKind,
    partition_model,
    select_piece,
    storage_bytes,
    unique_parameters,
    unwrap_model,
)
from lib.errors import InputError


class ListOfExperts(nn.Module):
    """A mixture of experts of the older kind: a ModuleList, with a shared expert beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        mlp = nn.Module()
        mlp.gate = nn.Linear(4, 2)
        mlp.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)]
        )
        mlp.shared_expert = nn.Linear(4, 4)
        self.layers[0].mlp = mlp
        self.scale = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mixtral, ListOfExperts])
def test_blocks_cover_every_element_exactly_once(make: type[nn.Module]) -> None:
    model = make()
    seen = {
        name: torch.zeros_like(p, dtype=torch.int) for name, p in unique_parameters(model).items()
    }
    for block in partition_model(model):
        for piece in block.pieces:
            select_piece(seen[piece.parameter], piece).add_(1)
            assert select_piece(seen[piece.parameter], piece).numel() == piece.num_params
    assert all((count == 1).all() for count in seen.values())
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(block.num_bytes for block in partition_model(model)) == total


def test_gpt2_blocks_are_the_submodules_of_each_layer() -> None:
    blocks = {block.name: block for block in partition_model(tiny_gpt2())}
    assert list(blocks)[:6] == [
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0.ln_1",
        "transformer.h.0.attn",
        "transformer.h.0.ln_2",
        "transformer.h.0.mlp",
    ]
    assert blocks["transformer.h.1.attn"].kind is BlockKind.ATTENTION
    assert blocks["transformer.h.1.attn"].layer == 1
    wte = blocks["transformer.wte"]
    assert wte.tied == ("lm_head.weight",)
    assert wte.modules == ("transformer.wte", "lm_head")


def test_each_packed_expert_is_a_block() -> None:
    blocks = {block.name: block for block in partition_model(tiny_mixtral())}
    expert = blocks["model.layers.1.mlp.experts.3"]
    assert expert.kind is BlockKind.EXPERT
    assert {piece.parameter for piece in expert.pieces} == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    assert expert.modules == ("model.layers.1.mlp.experts",)
    assert [p.parameter for p in blocks["model.layers.1.mlp"].pieces] == [
        "model.layers.1.mlp.gate.weight"
    ]


def test_experts_in_a_list_are_blocks_and_the_shared_expert_is_not() -> None:
    names = {block.name for block in partition_model(ListOfExperts())}
    assert names == {
        "scale",
        "layers.0.mlp",
        "layers.0.mlp.experts.0",
        "layers.0.mlp.experts.1",
    }


def test_a_three_dimensional_convolution_weight_is_no_pack_of_experts() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 5))
    (block,) = partition_model(model)
    assert block.pieces[0].expert is None


def test_wrappers_leave_no_prefix() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model)
    assert unwrap_model(compiled) is model
    assert [block.name for block in partition_model(compiled)] == ["0"]


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="no parameters"):
        partition_model(nn.ReLU())


def test_storage_bytes_counts_a_shared_storage_once() -> None:
    whole: Tensor = torch.zeros(100)
    assert storage_bytes([whole[:10], whole[50:], torch.zeros(2)]) == 408
