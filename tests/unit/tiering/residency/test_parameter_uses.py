"""Compressed models whose blocks hold weights of several kinds: encoders of text, images and sound,
and modules that take a weight in an unusual way. A weight's uses are those of the module that owns
it, not of its block.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from smallest_budget import named, smallest
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import PlacementError
from lib.precision.perturb import lossy_blocks, perturb
from lib.tiering import attach

TEXT: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 40,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 8,
}
GEMMA = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
IDS = torch.tensor([[2, 7, 5, 80]])
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
SOUND = torch.linspace(-1, 1, 800).sin().view(1, -1)
SPECTRUM = torch.linspace(-1, 1, 16 * 32).view(1, 16, 32)
DISTIL = {"vocab_size": 90, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
WAV = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SPEECH = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 90}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
IMAGE_TOKENS = torch.tensor([[2, 89, 89, 89, 89, 5]])


def build(name: str, given: dict[str, Any], **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    config = getattr(transformers, f"{name.removesuffix('ForMaskedLM')}Config")(**options)
    return getattr(transformers, f"{name}" if "For" in name else f"{name}Model")(config), given


def both(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of text and images that are compared."""
    options = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 64}
    return build(name, {"input_ids": IDS, "pixel_values": PIXELS}, **options)


def seeing(name: str, text: Any, vision: Any, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model of text in which images stand for some tokens."""
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_index=89, **options
    )
    given = {"input_ids": IMAGE_TOKENS, "pixel_values": PIXELS}
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), given


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "bert": lambda: build("Bert", {"input_ids": IDS}, **TEXT),
    "bert with a tied head": lambda: build("BertForMaskedLM", {"input_ids": IDS}, **TEXT),
    "roberta": lambda: build("Roberta", {"input_ids": IDS}, **TEXT),
    "xlm-roberta": lambda: build("XLMRoberta", {"input_ids": IDS}, **TEXT),
    "camembert": lambda: build("Camembert", {"input_ids": IDS}, **TEXT),
    "distilbert": lambda: build("DistilBert", {"input_ids": IDS}, **DISTIL),
    "albert": lambda: build("Albert", {"input_ids": IDS}, embedding_size=64, **TEXT),
    "electra": lambda: build("Electra", {"input_ids": IDS}, embedding_size=64, **TEXT),
    "mpnet": lambda: build("MPNet", {"input_ids": IDS}, **TEXT),
    "deberta-v2": lambda: build(
        "DebertaV2",
        {"input_ids": IDS},
        relative_attention=True,
        position_buckets=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        **TEXT,
    ),
    "clip": lambda: both("CLIP"),
    "siglip": lambda: both("Siglip"),
    "vit": lambda: build("ViT", {"pixel_values": PIXELS}, **VISION),
    "dinov2": lambda: build("Dinov2", {"pixel_values": PIXELS}, **VISION),
    "llava": lambda: seeing(
        "Llava",
        transformers.LlamaConfig(**TEXT),
        transformers.CLIPVisionConfig(**VISION, projection_dim=64),
    ),
    "paligemma": lambda: seeing(
        "PaliGemma",
        transformers.GemmaConfig(**GEMMA),
        transformers.SiglipVisionConfig(**VISION),
        projection_dim=64,
        hidden_size=64,
    ),
    "wav2vec2": lambda: build(
        "Wav2Vec2",
        {"input_values": SOUND},
        num_feat_extract_layers=2,
        apply_spec_augment=False,
        **WAV,
        **POSITIONS,
        **{name: value for name, value in TEXT.items() if name != "max_position_embeddings"},
    ),
    "whisper": lambda: build(
        "Whisper",
        {"input_features": SPECTRUM, "decoder_input_ids": IDS},
        num_mel_bins=16,
        max_source_positions=16,
        encoder_layers=2,
        decoder_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **SPEECH,
        **HEADS,
    ),
}


def outputs(model: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        found = model(**given)
    found = found.to_tuple() if hasattr(found, "to_tuple") else (found,)
    return [value for value in found if isinstance(value, Tensor)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Allow for what kernels round: activations to bfloat16, which is less than codes do."""
    for got, wanted in zip(found, expected, strict=True):
        if wanted.numel() > 1:  # of a single number, as of one picture's likeness, little is left
            assert (got - wanted).abs().max() <= 0.04 * wanted.abs().max()


def rounded_outputs(model: nn.Module, given: dict[str, Any], precision: str) -> list[Tensor]:
    """Return the outputs of the model whose weights are those that its records decode to."""
    names = {block.name: precision for block in lossy_blocks(model, precision)}  # type: ignore[arg-type]
    with perturb(model, names):  # type: ignore[arg-type]
        return outputs(model, given)


def check_compressed(
    model: nn.Module, given: dict[str, Any], precision: str, *, resident: bool, folder: Path
) -> None:
    """Compare an attached model with one whose weights were rounded by the codec."""
    model.eval()
    expected, wanted = outputs(model, given), rounded_outputs(model, given, precision)
    budget = {"HBM": None if resident else smallest(model, precision), "SSD": None}
    with attach(model, budget=budget, precision=precision, spill_dir=folder) as runtime:
        try:
            found = outputs(model, given)
        except PlacementError as refusal:  # a use that no plan foresees
            runtime.budget = {"HBM": named(refusal), "SSD": None}
            found = outputs(model, given)
        assert_close(found, wanted)
        limit = runtime.budget["HBM"]
        assert limit is None or runtime.stats().peak_resident_bytes <= limit
    for got, before in zip(outputs(model, given), expected, strict=True):
        assert torch.equal(got, before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*of weights stay as they are")
def test_compressed_encoders_compute_with_the_weights_of_their_records(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, given = MODELS[name]()
    for precision in ("int8", "int4", "int3"):
        check_compressed(model, given, precision, resident=True, folder=tmp_path)
    check_compressed(model, given, "int4", resident=False, folder=tmp_path)


class Block(nn.Module):
    """A block of the layer list with weights of one kind inside, and a norm beside them."""

    def __init__(self, inner: nn.Module, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.norm, self.use = inner, nn.LayerNorm(64), use

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.use(self.inner, x))


class Raw(nn.Module):
    """A parameter that no module of torch owns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))


class Tied(nn.Module):
    """One weight in several roles: looked up, multiplied with, and taken as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.raw = nn.Embedding(64, 64), nn.Linear(64, 64, False), Raw()
        self.head.weight = self.raw.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.embed(ids(x)) + x @ self.raw.weight


class OwnForward(nn.Linear):
    """A Linear that multiplies in its own way."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t()


def ids(x: Tensor) -> Tensor:
    """Number the rows of x."""
    return torch.arange(x.shape[-2]).expand(x.shape[:-1])


def channels(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x.transpose(1, 2)).transpose(1, 2)


def attend(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "linear": (lambda: nn.Linear(64, 64), lambda inner, x: inner(x)),
    "linear with a forward of its own": (lambda: OwnForward(64, 64), lambda inner, x: inner(x)),
    "linear looked up": (
        lambda: nn.Linear(64, 64),
        lambda inner, x: F.embedding(ids(x), inner.weight),
    ),
    "linear transposed": (lambda: nn.Linear(64, 64), lambda inner, x: x @ inner.weight.t()),
    "conv1d": (
        lambda: transformers.pytorch_utils.Conv1D(64, 64),
        lambda inner, x: inner(x),
    ),
    "embedding": (lambda: nn.Embedding(70, 64), lambda inner, x: x + inner(ids(x))),
    "embedding multiplied with": (
        lambda: nn.Embedding(64, 64),
        lambda inner, x: F.linear(x, inner.weight) + inner(ids(x)),
    ),
    "embedding bag": (
        lambda: nn.EmbeddingBag(70, 64),
        lambda inner, x: x + inner(ids(x).reshape(-1, 1)).view(x.shape),
    ),
    "raw": (Raw, lambda inner, x: x @ inner.weight + inner.weight[0]),
    "tied": (Tied, lambda inner, x: inner(x)),
    "attention": (lambda: nn.MultiheadAttention(64, 4, batch_first=True), attend),
    "convolution": (lambda: nn.Conv1d(64, 64, 3, padding=1), channels),
    "transposed convolution": (lambda: nn.ConvTranspose1d(64, 64, 3, padding=1), channels),
    "lstm": (lambda: nn.LSTM(64, 64, batch_first=True), lambda inner, x: inner(x)[0]),
    "bilinear": (lambda: nn.Bilinear(64, 64, 64), lambda inner, x: inner(x, x)),
}


@pytest.mark.parametrize("inside", [True, False], ids=["in a block", "as blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_is_computed_with_its_record(
    kind: str, inside: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, use = KINDS[kind]
    block = Block(make(), use)
    model = nn.Sequential(nn.Linear(64, 64), nn.ModuleDict({"0": block}) if inside else block)
    model.forward = lambda x: block(model[0](x))  # type: ignore[method-assign]
    given = {"x": torch.randn(1, 5, 64)}
    for precision in ("int8", "int4", "int3"):
        for resident in (True, False):
            check_compressed(model, given, precision, resident=resident, folder=tmp_path)
