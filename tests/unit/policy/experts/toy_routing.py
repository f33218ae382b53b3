"""Routing made up: what differs between real models, apart and at its clearest."""

import random

from lib.policy.experts.routing import Cell, Trace

KINDS = ("zipf", "drift", "topics", "sticky", "cyclic", "uniform")


def toy_trace(
    kind: str,
    *,
    layers: int = 6,
    experts: int = 16,
    used: int = 2,
    prompt: int = 24,
    steps: int = 120,
    seed: int = 0,
) -> Trace:
    """Return a trace whose experts are drawn by fixed popularity (zipf), by one that changes bit by
    bit (drift) or all at once (topics), after the token before (sticky), in turn (cyclic) or alike.
    """
    draw = random.Random(seed)
    weights = {layer: _zipf(draw, experts) for layer in range(layers)}
    last: dict[int, list[int]] = {}
    cells = []
    for step in range(prompt + steps):
        if kind == "topics" and step % 60 == 0:
            weights = {layer: _zipf(draw, experts) for layer in range(layers)}
        for layer in range(layers):
            if kind == "drift":
                one, other = draw.sample(range(experts), 2)
                share = weights[layer]
                if draw.random() < 0.2:
                    share[one], share[other] = share[other], share[one]
            if kind == "cyclic":
                chosen = [(step * used + place) % experts for place in range(used)]
            elif kind == "uniform":
                chosen = draw.sample(range(experts), used)
            else:
                kept = [one for one in last.get(layer, []) if draw.random() < 0.5]
                chosen = kept if kind == "sticky" else []
                chosen = chosen + _draw(draw, weights[layer], used - len(chosen), chosen)
            last[layer] = chosen
            cells.append(Cell(0, step >= prompt, step, layer, tuple(chosen)))
    counts = dict.fromkeys(range(layers), experts)
    return Trace(
        model=kind,
        experts=counts,
        per_token=dict.fromkeys(range(layers), used),
        expert_bytes=dict.fromkeys(range(layers), 100),
        cells=tuple(cells),
    )


def _zipf(draw: random.Random, experts: int) -> list[float]:
    weights = [1 / (1 + rank) for rank in range(experts)]
    draw.shuffle(weights)
    return weights


def _draw(draw: random.Random, weights: list[float], count: int, without: list[int]) -> list[int]:
    left = {index: weight for index, weight in enumerate(weights) if index not in without}
    chosen = []
    for _ in range(count):
        (index,) = draw.choices(list(left), list(left.values()))
        del left[index]
        chosen.append(index)
    return chosen
