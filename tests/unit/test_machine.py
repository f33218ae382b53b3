import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.machine import (
    DEFAULT_SPECS,
    UNMEASURED,
    MachineProfile,
    TierSpec,
    choose_machine,
    find_machine,
    fit_tier,
    load_machine,
    machine_from_json,
    machine_path,
    machine_to_json,
    save_machine,
)
from lib.vocabulary import Tier

ROOT = Path(__file__).parents[2]


def document(**changes: Any) -> dict[str, Any]:
    """Return a machine as one writes it by hand."""
    return {
        "format_version": 1,
        "name": "what if",
        "tiers": {
            "HBM": {"setup_us": 1, "bandwidth_gb_s": 800, "capacity_bytes": "24GiB"},
            "CXL": {"name": "CXL 3", "setup_us": 2.5, "bandwidth_gb_s": 400},
        },
        **changes,
    }


def tier_document(**changes: Any) -> dict[str, Any]:
    return document(tiers={"SSD": {"setup_us": 80, "bandwidth_gb_s": 2.5, **changes}})


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    machine = MachineProfile(
        name="here",
        tiers=DEFAULT_SPECS,
        capacity_bytes={Tier.CPU: 2**34},
        compute={"fp32": 5.3e9, "int8": 13e9},
        measured=True,
    )
    save_machine(machine, tmp_path / "machine.json")
    assert load_machine(tmp_path / "machine.json") == machine


def test_a_machine_may_be_written_by_hand() -> None:
    machine = machine_from_json(document())
    assert machine.capacity_bytes == {Tier.HBM: 24 * 2**30}
    assert machine.tiers[Tier.CXL] == TierSpec("CXL 3", 2.5, 400)
    assert machine.tiers[Tier.HBM].name == "HBM"
    assert not machine.measured
    assert Tier.SSD not in machine.tiers
    assert machine_from_json(machine_to_json(machine)) == machine


def test_the_documented_machine_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "machine.md").read_text()
    (tmp_path / "machine.json").write_text(text.split("```json\n")[1].split("```")[0])
    assert load_machine(tmp_path / "machine.json").tiers


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "a machine must be an object"),
        ({}, "a machine lacks format_version, name, tiers"),
        (document(format_version=2), "format_version 2 is unknown; allowed: 1"),
        (document(name=""), "name '' must be text"),
        (document(bandwith=3), "a machine has 'bandwith'; allowed: compute_weights_per_s, "),
        (document(measured=1), "measured 1 must be true or false"),
        (document(tiers=[]), "tiers must be an object"),
        (document(tiers={}), "at least one tier"),
        (document(tiers={"DISK": {}}), "unknown tier 'DISK'; allowed: HBM, CPU"),
        (document(tiers={"SSD": 3}), "tier SSD must be an object, not 3"),
        (document(tiers={"SSD": {"setup_us": 1}}), "tier SSD lacks bandwidth_gb_s"),
        (tier_document(latency=1), "tier SSD has 'latency'; allowed: bandwidth_gb_s, "),
        (tier_document(name=3), "name 3 must be text"),
        (tier_document(setup_us=-1), "tier SSD: setup_us -1 must be"),
        (tier_document(setup_us="1"), "tier SSD: setup_us '1' must be"),
        (tier_document(bandwidth_gb_s=0), "tier SSD: bandwidth_gb_s 0 must be"),
        (tier_document(bandwidth_gb_s=True), "tier SSD: bandwidth_gb_s True must be"),
        (tier_document(bandwidth_gb_s=float("inf")), "tier SSD: bandwidth_gb_s inf must be"),
        (tier_document(capacity_bytes="64 gigs"), "tier SSD: capacity_bytes: size '64 gigs'"),
        (tier_document(capacity_bytes=-1), "tier SSD: capacity_bytes: size -1"),
        (document(compute_weights_per_s=3), "compute_weights_per_s must be an object"),
        (document(compute_weights_per_s={"fp31": 1}), "compute of 'fp31': no such precision"),
        (document(compute_weights_per_s={"fp32": 0}), "compute of fp32: 0 must be weights per"),
        (document(compute_weights_per_s={"fp32": "1"}), "compute of fp32: '1' must be weights"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, wrong: Any, message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="machine.json: ") as caught:
        load_machine(path)
    assert message in str(caught.value)


def test_files_that_are_no_machine_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't be read .*tierhints probe"):
        load_machine(tmp_path / "missing.json")
    (tmp_path / "machine.json").write_text('{"name": ')
    with pytest.raises(InputError, match=r"machine.json: not complete JSON"):
        load_machine(tmp_path / "machine.json")


def test_a_profile_made_in_code_is_checked_too() -> None:
    with pytest.raises(InputError, match="tier SSD has a capacity and no bandwidth"):
        MachineProfile(
            name="m", tiers={Tier.CPU: DEFAULT_SPECS[Tier.CPU]}, capacity_bytes={Tier.SSD: 1}
        )
    with pytest.raises(InputError, match="capacity_bytes -1 must be 0 or more"):
        MachineProfile(name="m", tiers=DEFAULT_SPECS, capacity_bytes={Tier.SSD: -1})


SIZES = (2**18, 2**20, 2**22, 2**24, 2**26)


@given(st.floats(0.1, 1e5), st.floats(0.01, 1e4))
def test_exact_timings_are_fitted_exactly(setup_us: float, bandwidth_gb_s: float) -> None:
    spec = TierSpec("t", setup_us, bandwidth_gb_s)
    fitted = fit_tier("t", [(size, spec.transfer_seconds(size)) for size in SIZES])
    for size in SIZES:
        assert fitted.transfer_seconds(size) == pytest.approx(spec.transfer_seconds(size), rel=1e-3)


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.floats(1e-6, 10)), min_size=1))
def test_any_timings_have_a_fit(points: list[tuple[int, float]]) -> None:
    spec = fit_tier("t", points)
    assert spec.setup_us >= 0
    assert spec.bandwidth_gb_s > 0


def test_one_size_has_no_setup_time() -> None:
    spec = fit_tier("t", [(10**9, 0.5), (10**9, 0.5)])
    assert (spec.setup_us, spec.bandwidth_gb_s) == (0, pytest.approx(2))


def test_the_fit_follows_large_transfers_more_than_small_ones() -> None:
    spec = TierSpec("t", 100, 2)
    points = [(size, spec.transfer_seconds(size)) for size in SIZES]
    points[0] = (SIZES[0], 2 * points[0][1])
    fitted = fit_tier("t", points)
    assert fitted.transfer_seconds(SIZES[-1]) == pytest.approx(points[-1][1], rel=0.01)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's empty cache folder, in which machine files are looked for."""
    monkeypatch.delenv("TIERHINTS_MACHINE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_machine_is_found_in_the_users_cache_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine_path() == cache / "tierhints" / "machine.json"
    assert find_machine() is None and choose_machine(None) is UNMEASURED
    here = MachineProfile(name="here", tiers=UNMEASURED.tiers, measured=True)
    save_machine(here, cache / "machine.json")  # of the working folder: nobody looks there
    assert find_machine() is None
    save_machine(here, cache / "tierhints" / "machine.json")
    assert find_machine() == choose_machine(None) == here
    assert choose_machine(UNMEASURED) is UNMEASURED
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(cache))
    assert machine_path() == cache / ".cache" / "tierhints" / "machine.json"


def test_a_variable_names_the_machine_file_or_says_that_there_is_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_machine(UNMEASURED, cache / "tierhints" / "machine.json")
    there = MachineProfile(name="there", tiers=UNMEASURED.tiers)
    save_machine(there, cache / "there.json")
    monkeypatch.setenv("TIERHINTS_MACHINE", str(cache / "there.json"))
    assert find_machine() == choose_machine(None) == there
    monkeypatch.setenv("TIERHINTS_MACHINE", "")
    assert machine_path() is None and find_machine() is None
    assert choose_machine(cache / "there.json") == there
    monkeypatch.setenv("TIERHINTS_MACHINE", str(cache / "nowhere.json"))
    with pytest.raises(InputError, match=r"nowhere.json can't be read .* tierhints probe"):
        choose_machine(None)
