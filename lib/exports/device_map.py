"""Tiers as an Accelerate / Transformers ``device_map``, with the ``max_memory`` of the same bytes.

HBM is the compute device, CPU "cpu", SSD "disk". Accelerate computes every module on the compute
device and brings offloaded weights there before each call, so one device may split the modules that
a model's author lists in ``_no_split_modules``; several devices may not, and are not written.
"""

import json
from collections import Counter
from collections.abc import Mapping

from ..vocabulary import Tier
from .outline import Export, Outline, list_some

FILE = "device_map.json"
_PLACES = {
    Tier.CPU: "cpu",
    Tier.CXL: "cpu",
    Tier.PEER: "cpu",
    Tier.SSD: "disk",
    Tier.OBJECT: "disk",
}


def export_device_map(outline: Outline, *, device: str) -> Export:
    """Return the map as JSON. ``device``: cuda makes HBM device 0, cpu makes it the RAM."""
    main: int | str = 0 if device == "cuda" else "cpu"
    modules = _place_modules(outline)
    tiers = _module_tiers(outline, modules)
    places = {module: _PLACES.get(tier, main) for module, (tier, _) in tiers.items()}
    places |= dict.fromkeys(outline.buffers, main)
    lost = list(_lost(outline, modules, tiers, main))
    stray = [name for name in places if name not in outline.modules and places[name] != main]
    if stray:
        lost.append(
            f"{list_some(stray)}: weights that belong to no module of their own get no hook, so "
            "they stay on the compute device"
        )
        places |= dict.fromkeys(stray, main)
    used: Counter[int | str] = Counter({main: 0})
    for module, (_, num_bytes) in tiers.items():
        used[places[module]] += num_bytes
    offloads = "disk" in places.values()
    folder = ', offload_folder="offload"' if offloads else ""
    document = {
        "device_map": places,
        "max_memory": {str(place): used[place] for place in used if place != "disk"},
    }
    return Export(
        files={FILE: json.dumps(document, indent=2) + "\n"},
        summary={"modules": len(places), "bytes": {str(key): used[key] for key in used}},
        commands=(
            f'device_map = json.load(open("{FILE}"))["device_map"]',
            f"model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map{folder})",
        ),
        lost=tuple(lost),
    )


def _place_modules(outline: Outline) -> dict[str, dict[str, int]]:
    """Return block -> the modules it is placed by, with its bytes in each; no module lies inside
    another. A block is one module, unless packed experts lie in it: then the owners of the weights.
    """
    owners = {w.module for b in outline.blocks for w in b.weights if w.expert is not None}
    around = {
        ".".join(steps[:length])
        for steps in (owner.split(".") for owner in owners)
        for length in range(1, len(steps) + 1)
    }
    modules: dict[str, dict[str, int]] = {}
    for block in outline.blocks:
        if block.name not in around and all(w.expert is None for w in block.weights):
            modules[block.name] = {block.name: block.num_bytes}
            continue
        num_bytes: Counter[str] = Counter()
        for weight in block.weights:
            num_bytes[weight.module] += weight.num_bytes
        modules[block.name] = dict(num_bytes)
    return modules


def _module_tiers(
    outline: Outline, modules: Mapping[str, Mapping[str, int]]
) -> dict[str, tuple[Tier, int]]:
    """Return module -> tier and bytes. Where blocks of several tiers share a module, the tier of
    most of its bytes wins; modules tied to a block go with it.
    """
    members: dict[str, Counter[Tier]] = {}
    for block in outline.blocks:
        for module, num_bytes in modules[block.name].items():
            members.setdefault(module, Counter())[block.hint.tier] += num_bytes
    tiers = {
        module: (num_bytes.most_common(1)[0][0], num_bytes.total())
        for module, num_bytes in members.items()
    }
    for block in outline.blocks:
        for other in block.modules[1:]:
            if other not in tiers and other in outline.modules:
                tiers[other] = (tiers[next(iter(modules[block.name]))][0], 0)
    return tiers


def _lost(
    outline: Outline,
    modules: Mapping[str, Mapping[str, int]],
    tiers: Mapping[str, tuple[Tier, int]],
    main: int | str,
) -> list[str]:
    lost = []
    moved = {
        block.name: block.num_bytes
        for block in outline.blocks
        for module in modules[block.name]
        if tiers[module][0] is not block.hint.tier
    }
    if moved:
        lost.append(
            f"experts of one packed parameter can't be placed apart: {len(moved)} blocks "
            f"({list_some(moved)}) go with the rest of theirs"
        )
    present = {block.hint.tier for block in outline.blocks}
    for tier, place in _PLACES.items():
        if tier in present - {Tier.CPU, Tier.SSD}:
            lost.append(f"tier {tier}: a device map has no such place, {place!r} is used")
    if main == "cpu" and Tier.HBM in present and Tier.CPU in present:
        lost.append("tiers HBM and CPU: both are the RAM when the compute device is the CPU")
    split = [
        name
        for name in outline.whole
        if len({tier for key, (tier, _) in tiers.items() if key.startswith(f"{name}.")}) > 1
    ]
    if split:
        lost.append(
            f"{len(split)} modules that the model wants whole ({list_some(split)}) lie in several "
            "tiers: right on one compute device, but don't move parts to a second one by hand"
        )
    lost.append("order of reading ahead: Accelerate loads a module when it is called")
    return lost
