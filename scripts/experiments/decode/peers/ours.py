"""Our runtime with everything resident: lossless, at each width, and within each epsilon."""

from typing import Any

from scripts.experiments.decode.peers.base import Session, System, Task, register_system

LOSSLESS = "lossless"
_EPSILON = "epsilon-"


@register_system
class Ours(System):
    name = "ours"
    widths = (
        LOSSLESS,
        *(f"int{bits}" for bits in (8, 6, 5, 4, 3, 2)),
        *(f"{_EPSILON}{epsilon}" for epsilon in (0.005, 0.02, 0.05)),
    )

    def needs_hints(self, width: str) -> bool:
        return width.startswith(_EPSILON)

    def load(self, task: Task) -> Session:
        from lib.checkpoint.load import load
        from lib.checkpoint.models import quiet_transformers
        from lib.tiering import attach
        from lib.vocabulary import Tier
        from scripts.experiments.decode.peers.base import Sizes
        from scripts.experiments.decode.torch_session import TorchSession, lookups

        quiet_transformers(progress=False)
        model = load(task.checkpoint)
        looked_up = lookups(model)
        names = [name for name, module in model.named_modules() if module in looked_up]
        vectors = {id(weight): weight for weight in model.parameters() if weight.dim() < 2}
        width = task.width
        within = self.needs_hints(width)
        runtime = attach(
            model,
            task.hints if within else None,
            budget={Tier.HBM: None},
            weights=task.checkpoint,
            epsilon=float(width.removeprefix(_EPSILON)) if within else None,
            precision=None if within or width == LOSSLESS else width,
            device="cpu",
        )
        placements = runtime.plan.placements
        held = runtime.plan.bytes_per_tier()[Tier.HBM]
        held -= sum(weight.nbytes for weight in vectors.values())
        sizes = Sizes(
            held_bytes=held,
            read_bytes=held - sum(placements[name].held_bytes for name in names),
        )

        def compile_decoding(model: Any) -> Any:
            runtime.compile()  # for steps with a static cache; the eager session has another
            return model

        return TorchSession(model, sizes, compile_decoding)
