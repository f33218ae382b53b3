"""The digest of a model's weights: the same wherever they are, another one for other weights."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_gpt2, tiny_mixtral
from torch import nn

from lib.blocks import parameter_digest, partition_model, unique_parameters
from lib.checkpoint.files import File
from lib.checkpoint.load import load
from lib.checkpoint.source import open_checkpoint
from lib.errors import InputError
from lib.hints import BlockHint, Hints, ModelInfo
from lib.tiering import attach, empty_weights
from lib.vocabulary import Tier


def one_matrix(rows: int = 300, cols: int = 200) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(cols, rows))


def former_digest(model: nn.Module) -> str:
    """What hints have that were made by Tierhints 0.1."""
    digest = hashlib.sha256()
    for name, parameter in sorted(unique_parameters(model).items()):
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        values = parameter.detach().reshape(-1)
        if values.numel() > 65_536:
            values = values[torch.arange(65_536) * values.numel() // 65_536]
        digest.update(values.bfloat16().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def test_a_digest_names_its_scheme_and_tells_models_apart() -> None:
    model = tiny_gpt2()
    digest = parameter_digest(model)
    assert digest.startswith("sha256-ranges:") and len(digest) == len("sha256-ranges:") + 64
    assert digest == parameter_digest(tiny_gpt2())
    assert digest == parameter_digest(tiny_gpt2().to(torch.bfloat16))
    with torch.no_grad():
        model.transformer.ln_f.weight[3] += 0.25
    assert digest != parameter_digest(model)


@pytest.mark.parametrize("element", [0, 1023, 28_000, 59_999])
def test_the_first_and_the_last_elements_and_some_between_are_sampled(element: int) -> None:
    model: Any = one_matrix()
    before = parameter_digest(model)
    model[0].weight.data.view(-1)[element] += 1  # shows in no version counter
    assert parameter_digest(model) != before


def test_strides_leave_the_digest() -> None:
    model: Any = one_matrix()
    before = parameter_digest(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    assert not model[0].weight.is_contiguous()
    assert parameter_digest(model) == before


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: one_matrix(700)])
def test_the_scheme_of_a_digest_that_a_file_has_is_computed_as_it_was(make: Any) -> None:
    model = make()
    made_for = former_digest(model)
    assert parameter_digest(model, made_for) == made_for
    assert parameter_digest(model, parameter_digest(model)) == parameter_digest(model)
    assert parameter_digest(model, "md5:1").startswith("sha256-ranges:")


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mixtral])
def test_a_checkpoint_has_the_digest_of_its_model(
    tmp_path: Path, make: Any, dtype: torch.dtype, shard_size: str
) -> None:
    """Tied, sharded, and packed weights: a mixture has one tensor per expert on disk."""
    model = make()
    digest, former = parameter_digest(model), former_digest(model)
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=shard_size)
    empty = load(tmp_path)
    source = open_checkpoint(empty, tmp_path)
    names = unique_parameters(empty)
    assert source.digest(names) == digest
    assert source.digest(names, like=former) == former


def test_runs_across_packed_experts_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    model = tiny_mixtral()
    model.save_pretrained(tmp_path)
    source = open_checkpoint(load(tmp_path), tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    flat = model.get_parameter(name).detach().reshape(-1)
    inner = flat.numel() // model.config.num_local_experts
    runs = [(0, 5), (inner // 2 - 3, inner // 2 + 3), (inner - 2, 2 * inner + 2), (7, 7)]
    expected = torch.cat([flat[start:end] for start, end in runs])
    assert torch.equal(source.sample(name, runs), expected)


def test_a_checkpoint_is_read_in_small_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = one_matrix(2000, 1000)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with empty_weights():
        empty = one_matrix(2000, 1000)
    source = open_checkpoint(empty, tmp_path)
    sizes: list[int] = []
    read_into = File.read_into

    def count(self: File, start: int, out: memoryview, name: str) -> None:
        sizes.append(len(out))
        read_into(self, start, out, name)

    monkeypatch.setattr(File, "read_into", count)
    assert source.digest(unique_parameters(empty)) == parameter_digest(model)
    assert max(sizes) <= 2000 * 4 and sum(sizes) < 80_000


def hints_of(model: nn.Module, digest: str) -> Hints:
    blocks = {block.name: BlockHint(tier=Tier.HBM) for block in partition_model(model)}
    info = ModelInfo(id="toy", revision="", class_name="Toy", parameter_digest=digest)
    return Hints(model=info, blocks=blocks)


@pytest.mark.parametrize("former", [False, True])
def test_hints_of_either_scheme_are_checked_and_never_taken_blindly(
    tmp_path: Path, former: bool
) -> None:
    make_digest = former_digest if former else parameter_digest
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    right = hints_of(model, make_digest(model))
    budget = {"HBM": None, "SSD": None}
    attach(tiny_gpt2(), right, budget=budget).detach()
    attach(load(tmp_path), right, weights=tmp_path, budget=budget).detach()
    scheme, _, _ = make_digest(model).rpartition(":")
    wrong = hints_of(model, f"{scheme}:{'0' * 64}")
    with pytest.raises(InputError, match=rf"other weights .*digest {scheme}:0{{12}}\.\.\., this"):
        attach(tiny_gpt2(), wrong, budget=budget)
    with pytest.raises(InputError, match="other weights"):
        attach(load(tmp_path), wrong, weights=tmp_path, budget=budget)


def test_integers_and_scalars_have_a_digest() -> None:
    class Odd(nn.Module):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = nn.Parameter(torch.tensor(step), requires_grad=False)
            self.empty = nn.Parameter(torch.empty(0, 3))

    assert parameter_digest(Odd(1)) == parameter_digest(Odd(1)) != parameter_digest(Odd(2))
