"""Tiers: their order in bytes, bits by damage, names, and the form in files."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.progressive.ladder import (
    BLOCK_TOKENS,
    FULL,
    UNIFORM,
    KvShape,
    KvTier,
    Ladder,
    make_ladder,
    num_pages,
)
from lib.vocabulary import Precision

SHAPE = KvShape(layers=3, heads=2, key_dim=64, value_dim=64, itemsize=4)
SHAPES = st.builds(
    KvShape,
    layers=st.integers(1, 4),
    heads=st.integers(1, 4),
    key_dim=st.integers(1, 200),
    value_dim=st.integers(1, 200),
    itemsize=st.sampled_from([2, 4]),
)
PRECISIONS = [p for p in Precision if p.startswith("int")]


def toy_damage(layers: int, seed: int = 0) -> Any:
    """Return what layers would cost at each precision: more at fewer bits, one layer much more."""
    draw = random.Random(seed)
    return [
        SimpleNamespace(
            layer=layer,
            damage={
                str(p): SimpleNamespace(
                    keys=draw.uniform(1, 100) * 4.0**rank, values=draw.uniform(1, 100) * 4.0**rank
                )
                for rank, p in enumerate(PRECISIONS)
            },
        )
        for layer in range(layers)
    ]


@pytest.mark.parametrize(
    "name", ["audit", "bounds", "calibration", "estimators", "ladder", "scheduler"]
)
def test_what_is_pure_needs_no_torch(name: str) -> None:
    code = f"import sys, lib.progressive.{name}; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == "False"


@given(
    shape=SHAPES, tokens=st.integers(1, 1500), more=st.integers(0, 200), window=st.integers(0, 64)
)
def test_bytes_never_fall_with_the_tier_nor_their_peak_with_tokens(
    shape: KvShape, tokens: int, more: int, window: int
) -> None:
    ladder = make_ladder(shape)
    held = [ladder.num_bytes(tier, tokens) for tier in range(len(ladder.tiers))]
    assert held == sorted(held)
    assert (len(set(held)) == len(held)) or not num_pages(tokens)
    assert 0 <= held[-1] - tokens * shape.token_bytes < BLOCK_TOKENS * shape.token_bytes
    peaks = [ladder.peak_bytes(tier, tokens, window=window) for tier in range(len(ladder.tiers))]
    assert peaks == sorted(peaks)
    for tier, peak in enumerate(peaks):
        assert held[tier] == ladder.tiers[tier].num_bytes(shape, tokens) <= peak
        assert peak <= ladder.peak_bytes(tier, tokens + more, window=window)
        assert peak <= ladder.peak_bytes(tier, tokens, window=window + more)


@given(
    tier=st.integers(0, 4),
    start=st.integers(0, 600),
    more=st.integers(1, 200),
    window=st.integers(0, 64),
)
def test_a_peak_covers_the_moment_before_each_page(
    tier: int, start: int, more: int, window: int
) -> None:
    """Grow a text token by token, with others behind it; pages are made once they are whole."""
    ladder = make_ladder(SHAPE)
    most = 0
    for text in range(start + 1, start + more + 1):
        pages = num_pages(text - 1)
        size = pages * ladder.tiers[tier].page_bytes(SHAPE)
        most = max(most, size + (text + window - pages * 64) * SHAPE.token_bytes)
    peak = ladder.peak_bytes(tier, start + more, start=start, window=window)
    assert most <= peak < most + BLOCK_TOKENS * SHAPE.token_bytes


def test_a_tier_that_saves_nothing_is_left_out() -> None:
    short = KvShape(layers=4, heads=2, key_dim=8, value_dim=8, itemsize=4)
    assert make_ladder(short).names == ("K3V2", "K4V4", "K6V5", FULL)
    assert make_ladder(KvShape(layers=1, heads=1, key_dim=4, value_dim=4, itemsize=2)).names == (
        FULL,
    )
    assert make_ladder(SHAPE).names == (*UNIFORM, FULL)


@pytest.mark.parametrize("seed", range(3))
def test_layers_differ_in_bits_within_the_bytes_of_all_alike(seed: int) -> None:
    damage = toy_damage(SHAPE.layers, seed)
    uniform, spread = make_ladder(SHAPE), make_ladder(SHAPE, damage=damage)
    assert spread.names == uniform.names
    for alike, tier in zip(uniform.tiers[:-1], spread.tiers[:-1], strict=True):
        assert tier.page_bytes(SHAPE) <= alike.page_bytes(SHAPE)
        assert predicted(tier, damage) <= predicted(alike, damage)
    assert any(len(set(tier.precisions or ())) > 1 for tier in spread.tiers)


def predicted(tier: KvTier, damage: Any) -> float:
    assert tier.precisions is not None
    return sum(
        layer.damage[keys].keys + layer.damage[values].values
        for layer, (keys, values) in zip(damage, tier.precisions, strict=True)
    )


def test_damage_has_to_be_this_models() -> None:
    with pytest.raises(InputError, match="of 2 layers, and the model has 3"):
        make_ladder(SHAPE, damage=toy_damage(2))
    damage = toy_damage(3)
    del damage[1].damage["int3"], damage[1].damage["int8"]
    with pytest.raises(InputError, match="layer 1 has no damage of int3, int8"):
        make_ladder(SHAPE, damage=damage)


def test_tiers_by_name() -> None:
    ladder = make_ladder(SHAPE)
    assert ladder.index("K6V5") == 2
    assert ladder.full == ladder.index(FULL) == 4
    with pytest.raises(InputError, match=r"no tier 'k6v5'.* K3V2, K4V4, K6V5, K8V8, full"):
        ladder.index("k6v5")
    assert ladder.restrict("K6V5  K4V4").names == ("K4V4", "K6V5", FULL)
    assert ladder.restrict(["full"]).names == ladder.restrict("").names == (FULL,)
    with pytest.raises(InputError, match="'K5V5'"):
        ladder.restrict("K4V4 K5V5")


def test_a_ladder_out_of_order_cant_be_made() -> None:
    low, mid, *_, full = make_ladder(SHAPE).tiers
    for tiers, said in [
        ((mid, low, full), "a page of tier K3V2 takes"),
        ((low, low, full), "twice"),
        ((low, mid), "last tier"),
        ((full, low), "last tier"),
        ((), "last tier"),
        ((KvTier(name="one", precisions=(low.precisions or ())[:1]), full), "for 1 layers"),
    ]:
        with pytest.raises(InputError, match=said):
            Ladder(shape=SHAPE, tiers=tiers)


def test_a_file_holds_the_whole_ladder() -> None:
    ladder = make_ladder(SHAPE, damage=toy_damage(3))
    document = json.loads(json.dumps(ladder.to_dict()))
    again = Ladder.from_dict(document)
    assert again == ladder
    assert again.digest == ladder.digest
    assert len(ladder.digest) == 16
    assert len({each.digest for each in (ladder, make_ladder(SHAPE), ladder.restrict("K4V4"))}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"tiers": None},
        {"tiers": [{"name": "x"}]},
        {"tiers": [{"name": "x", "precisions": [["int9", "int2"]] * 3}]},
        {"shape": {"layers": 3}},
        {"page_tokens": 32},
    ],
)
def test_a_document_that_is_no_ladder_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="ladder"):
        Ladder.from_dict(make_ladder(SHAPE).to_dict() | change)
