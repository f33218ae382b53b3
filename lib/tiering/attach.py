"""attach(): from a model, its hints and a budget to a runtime."""

from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..machine import MachineProfile
from ..policy.veto import Measure
from ..vocabulary import Tier
from .keeper import PlanKeeper
from .payload.known import KnownWeights
from .planning.budget import Budget
from .planning.inputs import HintsGiven
from .planning.needs import PrecisionChoice
from .planning.planned import plan
from .planning.plans import Mode
from .residency.archive import Archive
from .residency.originals import Originals
from .residency.stand_ins import plain_tensors
from .runtime import Runtime
from .stores import STORES, DeviceStore, KeptRecords, ResidualStore, Store, StoreOptions
from .transfer.charges import Charges
from .transfer.emulation import EmulatedTime, EmulatedTransport
from .transfer.readers import ReaderTransport
from .transfer.specs import EmulationSpec
from .transfer.transport import Transport


def attach(
    model: nn.Module,
    hints: HintsGiven = None,
    *,
    # What it may take.
    budget: Budget | None = None,
    weights: str | Path | None = None,
    spill_dir: str | Path | None = None,
    look_ahead: bool = True,
    # What it may cost.
    precision: PrecisionChoice = None,
    epsilon: float | str | None = None,
    measure: Measure | None = None,
    # Where it computes.
    device: str | torch.device | None = None,
    machine: MachineProfile | str | Path | None = None,
    mode: Mode = "real",
    emulation: EmulationSpec | None = None,
    known: KnownWeights | None = None,
) -> Runtime:
    """Place a model's weights and return the runtime, which is also a context manager that
    detaches.

    ``hints`` is a Hints, a parsed document of either form, or a file; it may be left out where
    there is a ``budget``, and without a budget it says where each block goes. ``forward`` and
    ``generate`` keep their signatures; the model is for inference while attached. ``plan`` says
    what would come of the same arguments.

    *What it may take.* ``budget`` bounds each tier (weights, slots and working memory together);
    without an accelerator HBM is the machine's RAM. ``weights`` is the safetensors checkpoint of a
    model on the meta device (``load(folder)``, or built inside ``empty_weights()``), which is then
    never in memory as a whole; compressed weights made from it are kept beside it for the
    next run ($TIERHINTS_RECORDS names another folder; empty: nowhere). ``spill_dir`` holds the SSD
    tier, and them, and keeps it for the next run (default: a temporary folder on a disk).
    ``look_ahead``: experts that are below are read before they are asked for, by what the model's
    own routers say of the next layers, while that pays.

    *What it may cost.* ``precision`` None keeps outputs bit for bit; "int4" and the like compress
    every matrix, but none below its floor; without ``weights`` the originals go to the SSD, for
    detach. ``epsilon`` (nats per token, or "ppl=1.02") bounds what precision may cost altogether:
    it makes floors from the KL that calibrated hints predict, those of the fewest bytes, and
    without a ``precision`` every block is held at its floor. ``measure`` runs the attached model on
    held-out text: precisions are raised until the upper bound of the measured KL is within epsilon,
    and only with it may a block go below 3 bits.

    *Where it computes.* ``device`` (default: where the model's first parameter is). ``machine``
    (machine.json) tells the planner, and an emulated run, how fast the tiers are (default: what
    ``tierhints probe`` has measured here, or in emulation ``DEFAULT_SPECS``). ``mode`` "emulated"
    leaves weights where they are and charges what ``emulation`` says. ``known``: records of the
    weights that another runtime holds in fast memory; what streams is what they lack.

    Raises InputError for hints that don't fit the model, a tier that the mode can't serve, a budget
    that is too small (with the smallest that would do), a checkpoint that is quantized or another
    model's, and a spill folder that is memory;
    PlacementError for a model that this or another offloader manages already, and for a plan that
    the veto refuses. The model is then as it was.
    """
    if mode == "emulated" and spill_dir is not None:
        raise InputError(
            "a spill_dir has no effect in emulated mode: leave it out, or use mode='real'"
        )
    planned = plan(
        model,
        hints,
        mode=mode,
        budget=budget,
        precision=precision,
        epsilon=epsilon,
        will_measure=measure is not None,
        weights=weights,
        machine=machine,
        emulation=emulation,
        device=None if device is None else _resolve_device(device),
    )
    planned.check_weights()
    folder = Path(spill_dir) if spill_dir is not None else None
    records = None
    if planned.checkpoint is not None and folder is None:
        records = KeptRecords(planned.checkpoint.path, planned.checkpoint.num_bytes)
    options = StoreOptions(device=planned.device, folder=folder, records=records, known=known)
    stores = _Stores(options, mode)
    charges: Charges = Charges()
    transport: Transport = ReaderTransport(stores, planned.device)
    if planned.emulation is not None:
        charges = time = EmulatedTime(planned.emulation, planned.device)
        transport = EmulatedTransport(time)
    with plain_tensors():
        originals = Originals(planned.model, planned.checkpoint)
    keeper = PlanKeeper(
        planned,
        originals,
        Archive(stores, originals, records, known, lasting=folder is not None),
        transport=transport,
        charges=charges,
        look_ahead=look_ahead,
    )
    runtime = Runtime(keeper)
    if measure is not None:
        try:
            runtime.check_quality(measure)
        except BaseException:
            runtime.detach()
            raise
    return runtime


class _Stores(dict[Tier, Store]):
    """The stores of the tiers, each opened when it is first used."""

    def __init__(self, options: StoreOptions, mode: Mode) -> None:
        super().__init__()
        self._options = options
        self._mode = mode

    def __missing__(self, tier: Tier) -> Store:
        store: type[Store] = DeviceStore if self._mode == "emulated" else STORES[tier]
        if tier is Tier.SSD and self._options.known is not None:
            store = ResidualStore
        self[tier] = store.open(self._options)
        return self[tier]


def _resolve_device(device: str | torch.device) -> torch.device:
    """Return a device with its index, so that it compares equal to a tensor's; raises InputError
    where it isn't here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} can't be used here: {str(error).splitlines()[0]}"
        ) from error
