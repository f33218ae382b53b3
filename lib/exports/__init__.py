"""Hints in the formats of other tools, each with what that tool can't express.

``device_map`` (Accelerate, Transformers), ``torchao_config``, ``llama_cpp`` (with ``gguf_names``),
``imatrix`` and ``vllm`` turn an ``Outline`` of a model into files; ``model`` makes the outline, and
is the only file here that imports torch. ``export`` (``tools``) does all of it, for any tool.
"""

from .device_map import export_device_map
from .imatrix import export_imatrix
from .llama_cpp import export_llama_cpp
from .outline import Export, Outline
from .tools import export
from .torchao_config import export_torchao
from .vllm import export_vllm

__all__ = [
    "Export",
    "Outline",
    "export",
    "export_device_map",
    "export_imatrix",
    "export_llama_cpp",
    "export_torchao",
    "export_vllm",
]
