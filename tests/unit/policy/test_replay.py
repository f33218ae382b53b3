import json
from dataclasses import asdict

import pytest
from toy_control import Machine, toy_facts

from lib.errors import InputError
from lib.machine import TierSpec
from lib.policy.control import POLICY_VERSION, Controller, Settings
from lib.policy.events import SCHEMA_VERSION, write_event
from lib.policy.replay import read_log, replay
from lib.policy.suppose import suppose
from lib.vocabulary import Tier

SETTINGS = Settings(dwell_us=1_000_000, refill_us=2_000_000, tokens=4, step_bytes=10**6)
SIZES = [10_000, 10_000, 40_000, 40_000, 10_000, 40_000, 40_000]


def toy_run() -> Machine:
    """Halve the budget and restore it, twice."""
    machine = Machine(toy_facts(SIZES), SETTINGS)
    for _ in range(2):
        machine.ask(120_000)
        machine.tick(500_000)
        machine.ask(None)
        machine.tick(700_000)
        machine.tick(700_000)
    return machine


def toy_log(machine: Machine) -> list[str]:
    header = {
        "schema_version": SCHEMA_VERSION,
        "policy_version": POLICY_VERSION,
        "settings": asdict(SETTINGS),
        "tiers": {"SSD": {"name": "SSD", "setup_us": 100, "bandwidth_gb_s": 0.01}},
    }
    lines = [json.dumps({"header": header})]
    again = Controller(SETTINGS)
    for event in machine.events:
        decision = again.observe(event)
        entry: dict[str, object] = {"observation": write_event(event), "digest": again.digest()}
        if decision is not None:
            entry["decision"] = write_event(decision)
        lines.append(json.dumps(entry))
    return lines


def test_a_log_gives_the_same_decisions() -> None:
    lines = toy_log(toy_run())
    log = read_log([*lines, "", *lines])
    assert len(log.runs) == 2
    assert replay(log) is None
    assert not log.torn


def test_the_first_difference_is_named() -> None:
    lines = toy_log(toy_run())
    place, entry = next(
        (place, json.loads(line))
        for place, line in enumerate(lines)
        if '"promote"' in line and json.loads(line)["decision"]["promote"]
    )
    entry["decision"]["promote"] = ["b0"]
    found = replay(read_log([*lines[:place], json.dumps(entry), *lines[place + 1 :]]))
    assert found is not None
    assert (found.line, found.what) == (place + 1, "decision")
    assert found.logged["promote"] == ["b0"] != found.replayed["promote"]
    lines[3] = lines[3].replace('"digest": "', '"digest": "0')
    found = replay(read_log(lines))
    assert found is not None and (found.line, found.what) == (4, "digest")


def test_a_torn_last_line_is_left_out_and_missing_ones_are_refused() -> None:
    lines = toy_log(toy_run())
    torn = [*lines[:-1], lines[-1][:20]]
    log = read_log([*torn, *lines])
    assert log.torn == [len(lines)]
    assert replay(log) is None
    with pytest.raises(InputError, match="lines are missing"):
        read_log([*lines[:4], *lines[5:]])
    with pytest.raises(InputError, match="the log is empty"):
        read_log([""])
    with pytest.raises(InputError, match="no header"):
        read_log(lines[1:])
    with pytest.raises(InputError, match="no entry"):
        read_log(["[]"])
    with pytest.raises(InputError, match="policy 99"):
        read_log([lines[0].replace(f'"policy_version": {POLICY_VERSION}', '"policy_version": 99')])


def test_the_log_itself_is_what_our_policy_would_have_done() -> None:
    machine = toy_run()
    supposed = suppose(read_log(toy_log(machine)).runs[0])
    assert sum(supposed.transitions.values()) == len(machine.moves)
    phases = supposed.phases
    assert all(a.until_us == b.from_us for a, b in zip(phases, phases[1:], strict=False))
    assert phases[0].fast_bytes <= 120_000
    assert phases[-1].fast_bytes == sum(SIZES)


def test_other_policies_budgets_and_machines_are_simulated() -> None:
    run = read_log(toy_log(toy_run())).runs[0]
    ours = suppose(run).to_json()
    assert ours["simulated"] is True
    never = suppose(run, policy="never-grow").to_json()
    assert never["transitions"] < ours["transitions"]
    assert never["tokens_per_s"] < ours["tokens_per_s"]
    larger = suppose(run, limit_bytes=sum(SIZES)).to_json()
    assert larger["transitions"] == 0
    fast = suppose(run, tiers={Tier.SSD: TierSpec("SSD", 1, 100.0)}).to_json()
    assert fast["tokens_per_s"] > ours["tokens_per_s"]
