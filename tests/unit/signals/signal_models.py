"""Models of a few hundred weights that the signal tests measure, and text for them."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

VOCABULARY = 11


class Bigram(nn.Module):
    """Logits of the next token from the last one alone: its Fisher has a closed form."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


class Experts(nn.Module):
    """Two packed experts of shape (2, width, width); every token uses both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width, width) / width)

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.weight[0]).relu() @ self.weight[1]


class MoeLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.experts = Experts(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.experts(self.norm(hidden)))


class ToyLM(nn.Module):
    """A language model with dropout, a norm, packed experts and a tied head."""

    def __init__(self, width: int = 6, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.dropout = nn.Dropout(0.5)
        self.layers = nn.ModuleList(MoeLayer(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        hidden = self.dropout(self.embed(input_ids))
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def toy_lm(seed: int = 0) -> ToyLM:
    torch.manual_seed(seed)
    return ToyLM()


def token_batches(num: int = 2, batch: int = 3, length: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (batch, length), generator=generator) for _ in range(num)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 3) -> None:
    """Take optimizer steps on the mean loss of random tokens."""
    for ids in token_batches(steps, seed=1):
        optimizer.zero_grad()
        output = model(input_ids=ids)
        logits = output if isinstance(output, Tensor) else output.logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
