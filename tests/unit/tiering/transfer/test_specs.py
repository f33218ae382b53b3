from pathlib import Path

import pytest

from lib.errors import InputError
from lib.tiering import DEFAULT_SPECS, Clock, EmulationSpec, TierSpec, load_specs, save_specs
from lib.vocabulary import Tier


def test_transfer_time_is_setup_plus_bytes_over_bandwidth() -> None:
    assert TierSpec("SSD", 30, 10).transfer_seconds(10**9) == pytest.approx(30e-6 + 0.1)
    assert DEFAULT_SPECS[Tier.CXL] == TierSpec("CXL", 2, 400)


@pytest.mark.parametrize(
    ("setup", "bandwidth"), [(-1, 1), (1, 0), (1, float("nan")), ("1", 1), (1e300, 1), (True, 1)]
)
def test_meaningless_numbers_are_refused(setup: float, bandwidth: float) -> None:
    with pytest.raises(InputError, match="tier X"):
        TierSpec("X", setup, bandwidth)


def test_specs_round_trip_and_keep_labels(tmp_path: Path) -> None:
    spec = EmulationSpec(
        specs={**DEFAULT_SPECS, Tier.CPU: TierSpec("CXL", 2.0, 400.0)}, clock=Clock.WALL
    )
    save_specs(spec, tmp_path / "spec.json")
    assert load_specs(tmp_path / "spec.json") == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not complete JSON"),
        ("[]", "expected"),
        ('{"tiers": {}, "tiers": {}}', "'tiers' appears twice"),
        ('{"tiers": {}, "clock": "sundial"}', "sundial"),
        ('{"tiers": {"TAPE": {"setup_us": 1, "bandwidth_gb_s": 1}}}', "unknown tier 'TAPE'"),
        ('{"tiers": {"SSD": {"setup_us": 1}}}', "tier SSD: expected"),
        ('{"tiers": {"SSD": {"setup_us": 1, "bandwidth_gb_s": 0}}}', "or more"),
        ('{"tier": {}}', "expected"),
    ],
)
def test_bad_spec_files_are_named_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_specs(path)


def test_a_missing_spec_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json"):
        load_specs(tmp_path / "none.json")
