"""GGUF names of a Hugging Face model's tensors, from the gguf package's own map.

llama.cpp's converter uses the same map. It knows no architecture by Hugging Face's model_type, so
that name is looked up among gguf's architectures, spelled without marks; the few that are converted
under another name stand in ``_OTHER_NAMES``.
"""

import re
from typing import Any

from ..errors import InputError
from ..extras import need_extra
from .outline import Weight

_OTHER_NAMES = {"mistral": "llama", "mixtral": "llama", "phi": "phi2", "gptbigcode": "starcoder"}
_FUSED = "gate_up_proj"
_NOT_QUANTIZED = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight$|^(position_embd|token_types)\.")
"""What llama-quantize keeps as it is, of the tensors that models here have: norms, routers,
positions (``tensor_allows_quantization`` in src/llama-quant.cpp)."""


class GgufNames:
    """The map of one model. Raises InputError where gguf is missing or has no such architecture."""

    def __init__(self, model_type: str, num_layers: int) -> None:
        gguf = import_gguf()
        spelled = _plain(model_type)
        wanted = _OTHER_NAMES.get(spelled, spelled)
        known = {_plain(name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if wanted not in known:
            raise InputError(
                f"gguf has no architecture named {model_type!r}: llama.cpp can't hold this model, "
                "or a newer gguf package knows it"
            )
        self._map = gguf.get_tensor_name_map(known[wanted], num_layers)

    def find(self, weight: Weight) -> tuple[str, ...]:
        """Return the tensors a parameter becomes: two for fused experts (gate, up), none where the
        architecture has no such tensor.
        """
        names = [weight.name]
        if weight.expert is not None and weight.name.endswith(_FUSED):
            stem = weight.name.removesuffix(_FUSED)
            names = [f"{stem}gate_proj", f"{stem}up_proj"]
        found = [self._map.get_name(name, try_suffixes=(".weight", ".bias")) for name in names]
        if not all(found):
            return ()
        # A packed parameter has no suffix of its own, its tensor in the file has one.
        ending = "" if weight.expert is None else ".weight"
        return tuple(f"{name}{ending}" for name in found)


def is_quantizable(tensor: str, weight: Weight) -> bool:
    """Say whether llama-quantize would change the type of a tensor."""
    matrix = len(weight.shape) >= 2 and tensor.endswith(".weight")
    return matrix and not _NOT_QUANTIZED.search(tensor)


def import_gguf() -> Any:
    """Return the gguf package; InputError says how to get it."""
    need_extra("gguf", "gguf")
    import gguf

    return gguf


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
