"""The Fisher diagonal as an importance matrix, read back by gguf."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import outline_of, tiny_llama
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_mixtral

from lib.blocks import parameter_digest
from lib.errors import InputError
from lib.exports import export_imatrix
from lib.signals import measure_fisher, save_fisher_diagonal

gguf = pytest.importorskip("gguf")


def save_diagonal(model: Any, path: Path) -> Path:
    batches = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(0)).split(2)
    result = measure_fisher(model, batches, keep_diagonal=True, seed=0)
    save_fisher_diagonal(result, path, parameter_digest=parameter_digest(model))
    return path


def export_and_read(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return the tensors and fields of the file, and the diagonal it was made from."""
    diagonal = save_diagonal(model, folder / "diagonal.safetensors")
    export = export_imatrix(outline_of(model), diagonal, identify=partial(parameter_digest, model))
    content = export.files["imatrix.gguf"]
    assert isinstance(content, bytes)
    (folder / "imatrix.gguf").write_bytes(content)
    reader = gguf.GGUFReader(folder / "imatrix.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return {t.name: t for t in reader.tensors}, fields, load_file(diagonal)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_mixtral])
def test_the_file_has_what_llama_cpp_looks_for(build: Any, tmp_path: Path) -> None:
    tensors, fields, _ = export_and_read(build(), tmp_path)
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["Fisher information"]
    assert fields["imatrix.chunk_size"] == 16 and fields["imatrix.chunk_count"] == 4
    stems = {name.rpartition(".")[0] for name in tensors}
    assert set(tensors) == {f"{stem}.{end}" for stem in stems for end in ("in_sum2", "counts")}
    for stem in stems:
        assert stem.endswith(".weight") and "norm" not in stem and "position" not in stem
        sums, counts = tensors[f"{stem}.in_sum2"], tensors[f"{stem}.counts"]
        assert sums.tensor_type == counts.tensor_type == gguf.GGMLQuantizationType.F32
        assert (sums.data > 0).all() and (counts.data == 64).all()
        assert counts.shape[0] == 1 and counts.shape[1] == sums.shape[1]


def test_values_are_fisher_sums_over_outputs(tmp_path: Path) -> None:
    tensors, _, fisher = export_and_read(tiny_gpt2(), tmp_path)
    conv = fisher["transformer.h.1.mlp.c_fc.weight"].numpy()  # Conv1D: (in, out)
    found = tensors["blk.1.ffn_up.weight.in_sum2"].data.reshape(-1) / 64
    np.testing.assert_allclose(found, conv.sum(axis=1), rtol=1e-5)


def test_llamas_linear_layers_keep_their_inputs(tmp_path: Path) -> None:
    tensors, _, fisher = export_and_read(tiny_llama(), tmp_path)
    linear = fisher["model.layers.2.self_attn.q_proj.weight"].numpy()  # Linear: (out, in)
    found = tensors["blk.2.attn_q.weight.in_sum2"].data.reshape(-1) / 64
    np.testing.assert_allclose(found, linear.sum(axis=0), rtol=1e-5)


def test_fused_experts_are_split_into_gate_and_up(tmp_path: Path) -> None:
    tensors, _, fisher = export_and_read(tiny_mixtral(), tmp_path)
    fused = fisher["model.layers.0.mlp.experts.gate_up_proj"].numpy()  # (experts, 2 x 32, 32)
    for name, rows in (("gate", slice(0, 32)), ("up", slice(32, 64))):
        found = tensors[f"blk.0.ffn_{name}_exps.weight.in_sum2"].data / 64
        expected = fused[:, rows].sum(axis=1)
        assert found.shape == (4, 32)
        np.testing.assert_allclose(found, np.maximum(expected, 1e-6 * expected.mean()), rtol=1e-5)


def test_channels_without_information_keep_a_little_weight(tmp_path: Path) -> None:
    model = tiny_llama()
    diagonal = save_diagonal(model, tmp_path / "diagonal.safetensors")
    values = load_file(diagonal)
    values["lm_head.weight"][:, :4] = 0
    values["model.embed_tokens.weight"].zero_()
    metadata = {
        "signal": "fisher_diag",
        "tokens": "64",
        "parameter_digest": parameter_digest(model),
    }
    save_file(values, diagonal, metadata=metadata)
    export = export_imatrix(outline_of(model), diagonal, identify=partial(parameter_digest, model))
    content = export.files["imatrix.gguf"]
    assert isinstance(content, bytes)
    (tmp_path / "imatrix.gguf").write_bytes(content)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    assert (tensors["output.weight.in_sum2"] > 0).all()
    assert (tensors["token_embd.weight.in_sum2"] == 64).all()


def test_other_files_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    outline, identify = outline_of(model), partial(parameter_digest, model)
    diagonal = save_diagonal(model, tmp_path / "diagonal.safetensors")
    with pytest.raises(InputError, match="measured on other weights"):
        export_imatrix(outline, diagonal, identify=lambda _: "sha256:" + "0" * 64)
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2)}, weights)
    with pytest.raises(InputError, match="is not a Fisher diagonal"):
        export_imatrix(outline, weights, identify=identify)
    with pytest.raises(InputError, match="can't be read"):
        export_imatrix(outline, tmp_path / "missing", identify=identify)
    values = load_file(diagonal)
    values["lm_head.weight"][0, 0] = float("nan")
    metadata = {
        "signal": "fisher_diag",
        "tokens": "64",
        "parameter_digest": parameter_digest(model),
    }
    save_file(values, diagonal, metadata=metadata)
    with pytest.raises(InputError, match=r"'lm_head.weight' .* aren't finite"):
        export_imatrix(outline, diagonal, identify=identify)
    del values["lm_head.weight"]
    save_file(values, diagonal, metadata=metadata)
    with pytest.raises(InputError, match=r"has no 'lm_head.weight'"):
        export_imatrix(outline, diagonal, identify=identify)
