import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.hints import (
    BlockHint,
    Hints,
    ModelInfo,
    assign_tiers,
    build_hints,
    hints_to_json,
    load_hints,
    match_hints,
    save_hints,
)
from lib.vocabulary import Precision, Tier

DIGEST = f"sha256:{'a' * 64}"


def make_hints(density: dict[str, float | None] | None = None) -> Hints:
    density = density or {"h.0.attn": 4.0, "h.0.mlp": 1.0, "wte": None}
    return build_hints(
        model=ModelInfo(id="tiny", revision="7", class_name="Tiny", parameter_digest=DIGEST),
        provenance={"signal": "adam_exp_avg_sq", "created": "2026-11-21T00:00:00Z"},
        num_bytes={name: 100 for name in density},
        num_params={name: 25 for name in density},
        density=density,
        signals={"h.0.attn": {"adam_exp_avg_sq": 4.0, "attention_fim_trace": [0.5, 0.25]}},
        reasons={"wte": "frozen"},
        hbm_threshold=0.3,
        cpu_threshold=0.8,
    )


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("hbm", "cpu", "counts"),
    [(0.3, 0.8, (3, 5, 2)), (0.5, 0.7, (5, 2, 3)), (0, 0, (0, 0, 10)), (1, 1, (10, 0, 0))],
)
def test_thresholds_are_cumulative_fractions_of_bytes(
    hbm: float, cpu: float, counts: tuple[int, int, int]
) -> None:
    importance = {f"b{i}": 1.0 - i / 10 for i in range(10)}
    tiers = assign_tiers(
        dict.fromkeys(importance, 8), importance, hbm_threshold=hbm, cpu_threshold=cpu
    )
    assert [list(tiers.values()).count(t) for t in (Tier.HBM, Tier.CPU, Tier.SSD)] == list(counts)
    assert list(tiers.values()) == sorted(tiers.values(), key=list(Tier).index)


@given(
    st.lists(st.tuples(st.integers(1, 10**12), st.floats(0, 1)), min_size=1, max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_more_important_block_is_never_farther_away(
    blocks: list[tuple[int, float]], first: float, second: float
) -> None:
    sizes = {f"b{i}": size for i, (size, _) in enumerate(blocks)}
    importance = {f"b{i}": value for i, (_, value) in enumerate(blocks)}
    low, high = sorted((first, second))
    tiers = assign_tiers(sizes, importance, hbm_threshold=low, cpu_threshold=high)
    order = sorted(sizes, key=lambda name: importance[name], reverse=True)
    distances = [list(Tier).index(tiers[name]) for name in order]
    assert distances == sorted(distances)
    hbm = sum(size for name, size in sizes.items() if tiers[name] is Tier.HBM)
    # Whole blocks: the share misses the threshold by half of the block on the edge at most.
    assert abs(hbm - low * sum(sizes.values())) <= max(sizes.values()) / 2 + 1e-6 * sum(
        sizes.values()
    )


def test_importance_is_relative_and_unknown_stays_unknown() -> None:
    hints = make_hints()
    assert hints.blocks["h.0.attn"].importance == 1.0
    assert hints.blocks["h.0.mlp"].importance == 0.25
    assert hints.blocks["wte"].importance is None
    assert hints.blocks["wte"].tier is Tier.SSD
    assert "frozen" in hints.blocks["wte"].reason


def test_a_diverged_signal_is_refused() -> None:
    with pytest.raises(InputError, match=r"'h.0.mlp'.*nan"):
        make_hints({"h.0.attn": 1.0, "h.0.mlp": float("nan")})


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    hints = make_hints()
    path = tmp_path / "new" / "tier_hints.json"
    save_hints(hints, path)
    assert load_hints(path) == hints
    assert [entry.name for entry in path.parent.iterdir()] == ["tier_hints.json"]


def test_floors_and_kl_curves_that_others_measured_are_kept(tmp_path: Path) -> None:
    document = hints_to_json(make_hints())
    document["blocks"]["h.0.mlp"] |= {"kl": {"int8": 1e-5, "int4": 2e-3}, "floor": "int4"}
    hints = load_hints(write(tmp_path / "in.json", document))
    assert hints.blocks["h.0.mlp"].floor is Precision.INT4
    save_hints(hints, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == document


def test_save_to_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        save_hints(make_hints(), tmp_path / "file" / "tier_hints.json")


def test_the_flat_form_loads_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "flat.json", {"h.0.attn": "HBM", "wte": "SSD"})
    with pytest.warns(UserWarning, match="no precision floors"):
        hints = load_hints(path)
    assert hints.model is None
    assert hints.blocks["wte"].tier is Tier.SSD


def edited(place: str, value: Any) -> dict[str, Any]:
    document = hints_to_json(make_hints())
    *path, last = place.split("/")
    node = document
    for step in path:
        node = node[step]
    node[last] = value
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"schema_version": 1, "mod', "truncated"),
        ("[" * 100_000, "not complete JSON"),
        ("1" * 5000, "not complete JSON"),
        ('{"a": "HBM", "a": "SSD"}', "'a' appears twice"),
        ({"h.0.attn": "DISK"}, "unknown tier 'DISK'; allowed: HBM, CPU, CXL, PEER, SSD, OBJECT"),
        ([], "expected an object"),
        ({}, "expected an object"),
        (edited("blocks/wte/tier", "DRAM"), r"blocks\.wte\.tier: 'DRAM' is unknown; allowed: HBM"),
        (edited("blocks/wte/importance", float("nan")), r"blocks\.wte\.importance is nan"),
        (edited("blocks/wte/importance", float("inf")), r"blocks\.wte\.importance is inf"),
        (edited("blocks/wte/importance", 1.5), r"blocks\.wte\.importance: 1.5"),
        (
            edited("blocks/wte/floor", "int7"),
            r"blocks\.wte\.floor: 'int7' is unknown; allowed: fp32",
        ),
        (edited("blocks/wte/bytes", "many"), r"blocks\.wte\.bytes"),
        (edited("schema_version", 2), "schema_version"),
        (edited("model/parameter_digest", "md5:1"), "parameter_digest"),
        (
            edited("provenance/signal", "No Such Thing"),
            r"provenance\.signal: 'No Such Thing' is unknown; a signal is named with lower-case",
        ),
        (edited("provenance/signal", 3), r"provenance\.signal: 3"),
        (edited("blocks", {}), "blocks"),
        (edited("extra", 1), "extra"),
    ],
)
def test_bad_files_are_named_errors(tmp_path: Path, document: Any, message: str) -> None:
    path = write(tmp_path / "tier_hints.json", document)
    with pytest.raises(InputError, match=message) as caught:
        load_hints(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tierhints collect"):
        load_hints(tmp_path / "none.json")


def test_names_match_by_prefix_and_the_longest_wins() -> None:
    hints = make_hints({"h": 1.0, "h.0.mlp.experts.1": 2.0, "wte": 3.0})
    blocks = ["wte", "h.0.attn", "h.0.mlp.experts.0", "h.0.mlp.experts.1"]
    matched = match_hints(hints, blocks, identify=lambda _: DIGEST)
    assert [matched[name].num_bytes for name in blocks] == [100] * 4
    assert matched["h.0.attn"] is hints.blocks["h"]
    assert matched["h.0.mlp.experts.1"] is hints.blocks["h.0.mlp.experts.1"]


def test_a_tied_module_may_be_named_if_the_tiers_agree() -> None:
    hints = Hints(blocks={"wte": BlockHint(tier=Tier.SSD), "lm_head": BlockHint(tier=Tier.SSD)})
    tied = {"lm_head": "wte"}
    assert list(match_hints(hints, ["wte"], identify=None, tied=tied)) == ["wte"]
    other = Hints(blocks={"wte": BlockHint(tier=Tier.HBM), "lm_head": BlockHint(tier=Tier.SSD)})
    with pytest.raises(InputError, match="'lm_head' says SSD, but .* 'wte', which is in HBM"):
        match_hints(other, ["wte"], identify=None, tied=tied)


def test_a_prefix_ends_at_a_dot() -> None:
    with pytest.raises(InputError, match=r"'h\.1'"):
        match_hints(make_hints({"h.1": 1.0}), ["h.10"], identify=lambda _: DIGEST)


@pytest.mark.parametrize(
    ("blocks", "digest", "message"),
    [
        (["h.0.attn", "h.0.mlp", "wte"], f"sha256:{'b' * 64}", "made for other weights"),
        (["h.0.attn", "h.0.mlp", "wte", "ln_f"], DIGEST, r"no hint \('ln_f'\)"),
        (["h.0.attn", "h.0.mlp"], DIGEST, "'wte' .*matches no block"),
        (["h.0", "wte"], DIGEST, "a part of block 'h.0'"),
    ],
)
def test_hints_that_do_not_fit_the_model_are_refused(
    blocks: list[str], digest: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        match_hints(make_hints(), blocks, identify=lambda _: digest)
