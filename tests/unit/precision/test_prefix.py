"""Forward passes that begin at a layer, on every architecture of tiny_models."""

import pytest
import torch
from torch import Tensor, nn

from lib.blocks import partition_model
from lib.precision.perturb import lossy_blocks, perturb
from lib.precision.prefix import ResumableForward
from lib.signals.summary import causal_logits
from lib.vocabulary import Precision
from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from tests.unit.signals.signal_models import toy_lm

IDS = torch.randint(0, 10, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_llama, tiny_mixtral, toy_lm])
def test_resumed_passes_have_the_bits_of_whole_ones(make_model) -> None:
    model = make_model().eval()
    forward = ResumableForward(model)
    with torch.inference_mode():
        assert torch.equal(forward.record(IDS), causal_logits(model, IDS))
        assert forward.resumes
        forward.record(IDS[:1])  # another batch
        for block in lossy_blocks(model, Precision.INT3):
            with perturb(model, {block.name: Precision.INT3}):
                expected = causal_logits(model, IDS[:1])
                assert torch.equal(forward.logits([block.name]), expected), block.name
        assert torch.equal(forward.logits([]), causal_logits(model, IDS[:1]))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_before_the_change_arent_computed() -> None:
    model = tiny_llama().eval()
    forward = ResumableForward(model)
    forward.record(IDS)
    calls: list[str] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(f"mlp {index}"))
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append("embedding"))
    for changed, expected in (
        (["model.layers.1.self_attn"], ["embedding", "mlp 1"]),
        (["model.layers.0.mlp", "model.layers.1.mlp"], ["embedding", "mlp 0", "mlp 1"]),
        (["model.norm"], ["embedding"]),
        (["lm_head"], ["embedding"]),
        (["model.embed_tokens"], ["embedding", "mlp 0", "mlp 1"]),
    ):
        calls.clear()
        forward.logits(changed)
        assert calls == expected, changed


class Skipping(nn.Module):
    """The last layer also sees what the first one was given, through the model itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        kept = hidden
        order = reversed(self.layers) if self.kind == "backwards" else self.layers
        for layer in order:
            given, hidden = hidden, layer(hidden)
            if self.kind == "between":
                hidden = hidden + given
            if self.kind == "in place":
                given.add_(hidden)
        if self.kind == "twice":
            hidden = self.layers[0](hidden)
        return self.head(hidden + kept if self.kind == "behind" else hidden)


@pytest.mark.parametrize("kind", ["behind", "between", "backwards", "in place", "twice"])
def test_other_models_take_whole_passes_or_the_same_bits(kind: str) -> None:
    model = Skipping(kind).eval()
    forward = ResumableForward(model)
    forward.record(IDS)
    assert forward.resumes == (kind == "behind")  # the embedding runs in every pass
    with torch.inference_mode():
        for block in partition_model(model):
            with perturb(model, {block.name: Precision.INT3}):
                assert torch.equal(forward.logits([block.name]), causal_logits(model, IDS))
