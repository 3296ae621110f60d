"""Models of the transformers library: converted by names, saved, and loaded again."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gossamer import Block, Unstructured, convert
from gossamer.nn import SparseLinear
from gossamer.sparsify import sparse_upcycling
from torch import nn

transformers = pytest.importorskip("transformers")
from gossamer import huggingface  # noqa: E402

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Llama": ("LlamaForCausalLM", SMALL, ["*.self_attn.*_proj", "*.mlp.*_proj"]),
    "Qwen2": ("Qwen2ForCausalLM", {**SMALL, "tie_word_embeddings": True}, ["*_proj"]),
    "OPT": (
        "OPTForCausalLM",
        {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        ["*.fc1", "*.fc2", "*_proj"],
    ),
    "Bert": (
        "BertModel",
        {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4},
        ["encoder.layer.*.attention", "encoder.layer.*.intermediate", "*.output.dense"],
    ),
    "ViT": (
        "ViTModel",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "image_size": 16, "patch_size": 8},
        ["*attention*", "*mlp*", "*intermediate*", "*output.dense"],
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    kind, sizes, _ = MODELS[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**sizes)).eval()
    if name == "ViT":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    return model, {"input_ids": torch.randint(0, 99, (2, 7))}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_converted_by_names_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    kind, _, include = MODELS[name]
    found = [n for n, _ in model.named_modules()]
    include = [p for p in include if fnmatch.filter(found, p)]
    pattern: Any = {"OPT": Block(8, 4), "ViT": Unstructured()}.get(name, "2:4")
    density = None if pattern == "2:4" else 0.4
    report = convert(model, pattern, "magnitude", include, force=True, density=density)
    swapped = [row.name for row in report.layers if row.swapped]
    assert len(swapped) >= 12
    assert all(isinstance(model.get_submodule(n), SparseLinear) for n in swapped)
    with torch.no_grad():
        y = model(**inputs)[0]
    huggingface.save_pretrained(model, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in files
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "gossamer"
    assert sorted(described["layers"]) == sorted(swapped)
    again = getattr(transformers, kind).from_pretrained(tmp_path)
    if not isinstance(pattern, Unstructured):  # has nothing to pack
        assert all(again.get_submodule(n).packed for n in swapped)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], y)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    again.save_pretrained(tmp_path / "again")  # by itself: it knows how
    third = getattr(transformers, kind).from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(third(**inputs)[0], y)


def test_a_layer_without_a_place_is_loaded(tmp_path: Path) -> None:
    model, inputs = made("Bert")
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight.zero_()
        convert(model, Unstructured(), include="*intermediate.dense", force=True)
        huggingface.save_pretrained(model, tmp_path)
        again = transformers.BertModel.from_pretrained(tmp_path)
        layer = again.encoder.layer[0].intermediate.dense
        assert layer.weight.validate().values.numel() == 0
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def test_a_gated_mlp_is_upcycled(tmp_path: Path) -> None:
    model, inputs = made("Llama")
    with torch.no_grad():
        y = model(**inputs)[0]
    experts = sparse_upcycling(model, "model.layers.1.mlp", experts=4, choose="tokens")
    assert list(experts) == ["model.layers.1.mlp"]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], y)
    with pytest.raises(TypeError, match=r"layers.1.mlp is UpcycledMLP: SparseLinear alone loads"):
        huggingface.save_pretrained(model, tmp_path)


def test_a_dense_checkpoint_becomes_sparse_while_it_is_loaded(tmp_path: Path) -> None:
    model, inputs = made("Llama")
    model.save_pretrained(tmp_path)
    config = huggingface.SparseConfig(
        pattern=[8, 8], prune="magnitude", density=0.5, include="*.mlp.*", force=True
    )
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    convert(model, Block(8, 8), "magnitude", "*.mlp.*", force=True, density=0.5)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    assert sorted(loaded.config.quantization_config.layers) == [
        f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("down", "gate", "up")
    ]
    loaded.save_pretrained(tmp_path / "sparse")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], again(**inputs)[0])
    sparse = [m.unpack() for m in again.modules() if isinstance(m, SparseLinear)]
    again.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(layer.values.grad.abs().sum() > 0 for layer in sparse)
