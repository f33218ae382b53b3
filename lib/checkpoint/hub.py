"""Checkpoints of the Hugging Face Hub, as folders on this machine."""

from pathlib import Path

from ..errors import InputError
from .load import first_line
from .models import check_model_name

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Weights, configuration and tokenizer; other formats of the same weights are not asked for."""


def checkpoint_folder(model: str) -> Path:
    """Return the folder of a model: the one that is named, or that of the Hub's cache for a Hub id,
    downloaded where the cache lacks it.

    Raises InputError for what is neither, and where the Hub can't be reached.
    """
    check_model_name(model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the client raises its HTTP library's own errors
        raise InputError(
            f"model {model!r} is neither a folder nor on the Hub ({type(error).__name__}: "
            f"{first_line(error)}): give a folder with config.json and safetensors files, or check "
            "the network and HF_HUB_OFFLINE"
        ) from error
