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
from gossamer.prune import magnitude_24
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


def test_a_loaded_model_is_trained_cast_changed_and_saved_again(tmp_path: Path) -> None:
    model, inputs = made("Llama")
    convert(model, "2:4", "magnitude", force=True, include="*_proj")
    huggingface.save_pretrained(model, tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert not loaded.is_quantized  # or Trainer would refuse it
    assert loaded.half().float().dtype == torch.float32
    mlp = loaded.model.layers[0].mlp
    mlp.up_proj = mlp.up_proj.unpack().to_dense()
    mlp.down_proj = SparseLinear.from_dense(
        mlp.down_proj.unpack().to_dense(), Block(4, 4), prune="magnitude", density=0.5
    )
    with pytest.raises(ValueError, match="the model's own state_dict"):
        huggingface.save_pretrained(loaded, tmp_path / "b", state_dict={"a": torch.zeros(1)})
    loaded.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    changed = again.model.layers[0].mlp
    assert type(changed.up_proj) is nn.Linear
    assert changed.down_proj.pattern == Block(4, 4)
    torch.testing.assert_close(again(**inputs).logits, loaded.eval()(**inputs).logits)


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


INITIALISED: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
         "decoder_start_token_id": 0},
        {"input_ids": torch.arange(7)[None], "decoder_input_ids": torch.arange(5)[None]},
    ),
    "CLIP": (
        "CLIPModel",
        {
            "text_config": {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
                            "num_hidden_layers": 1, "num_attention_heads": 4, "bos_token_id": 1,
                            "eos_token_id": 2, "max_position_embeddings": 16},
            "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                              "num_attention_heads": 4, "image_size": 16, "patch_size": 8},
            "projection_dim": 16,
        },
        {"input_ids": torch.tensor([[1, 5, 2]]), "pixel_values": torch.ones(1, 3, 16, 16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("pattern", ["2:4", Block(4, 4)], ids=str)
@pytest.mark.parametrize("name", INITIALISED)
def test_models_that_initialise_the_weights_of_their_layers_are_loaded(
    name: str, pattern: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kind, sizes, inputs = INITIALISED[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**sizes)).eval()
    density = None if pattern == "2:4" else 0.5
    exclude = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    report = convert(model, pattern, "magnitude", exclude=exclude, force=True, density=density)
    assert sum(row.swapped for row in report) >= 14
    huggingface.save_pretrained(model, tmp_path)
    again = cls.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize(
    ("kind", "head", "base"),
    [("Llama", "LlamaForCausalLM", "LlamaModel"), ("Bert", "BertForMaskedLM", "BertModel")],
)
def test_sparse_layers_come_with_another_head(
    kind: str, head: str, base: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    head, base = getattr(transformers, head), getattr(transformers, base)
    model = head(head.config_class(**{**MODELS[kind][1], "tie_word_embeddings": False})).eval()
    report = convert(model, prune="magnitude", force=True)
    x = torch.arange(7)[None]
    with torch.no_grad():
        y = model.base_model(x)[0]
    huggingface.save_pretrained(model, tmp_path / "head")
    of_base = [row.name for row in report if row.name.startswith(model.base_model_prefix + ".")]
    assert len(of_base) < len(report.layers)
    alone = base.from_pretrained(tmp_path / "head")
    names = [n for n, m in alone.named_modules() if isinstance(m, SparseLinear)]
    assert [f"{model.base_model_prefix}.{n}" for n in names] == of_base
    assert sorted(alone.config.quantization_config.layers) == sorted(names)
    alone.save_pretrained(tmp_path / "base")
    other = head.from_pretrained(tmp_path / "base")
    assert [n for n, m in other.named_modules() if isinstance(m, SparseLinear)] == of_base
    for each in (alone, base.from_pretrained(tmp_path / "base"), other.base_model):
        with torch.no_grad():
            assert torch.equal(each(x)[0], y)


def test_a_config_is_of_patterns_that_can_be_saved(tmp_path: Path) -> None:
    model, inputs = made("Llama")
    model.save_pretrained(tmp_path)
    for pattern, written in ((Block(8, 4), [8, 4]), ((8, 4), [8, 4]), ("unstructured",) * 2):
        config = huggingface.SparseConfig(
            pattern=pattern, prune="magnitude", density=0.5, include="*.mlp.*", force=True
        )
        assert json.loads(config.to_json_string())["pattern"] == written
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        dense, _ = made("Llama")
        wanted = Unstructured() if pattern == "unstructured" else Block(8, 4)
        convert(dense, wanted, "magnitude", "*.mlp.*", force=True, density=0.5)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs)[0], dense(**inputs)[0])
    for wrong in ("1:4", "activation", [4], 4, Unstructured(0.5)):
        with pytest.raises(ValueError, match=r"expected '2:4', 'unstructured', a gossamer\.Block"):
            huggingface.SparseConfig(pattern=wrong)
    with pytest.raises(ValueError, match="Block: 4 x 0, expected 1 to 64"):
        huggingface.SparseConfig(pattern=[4, 0])


def test_layers_that_t5_gives_another_dtype_stay_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, sizes, inputs = INITIALISED["T5"]
    cls = getattr(transformers, kind)
    cls(cls.config_class(**sizes)).half().save_pretrained(tmp_path)
    model, pruned = (cls.from_pretrained(tmp_path, dtype=torch.float16) for _ in range(2))
    report = convert(model, prune="magnitude", sample_input=inputs, force=True)
    rows = {row.name: row for row in report if row.name.endswith(".wo")}
    assert [row.dtype for row in rows.values()] == ["float32"] * 2
    for row in rows.values():
        assert not row.swapped
        assert row.kernel is None
        assert row.pruned
        assert row.reason == "the model gives it float16, its weight is float32"
    assert sum(row.swapped for row in report) == 14
    for row in report:
        if row.pruned:
            weight = pruned.get_submodule(row.name).weight
            weight.data = magnitude_24(weight.data)
    with torch.no_grad():
        y = pruned.double()(**inputs)[0]
        torch.testing.assert_close(model(**inputs)[0].double(), y, rtol=2e-2, atol=2e-2)


def test_layers_of_gpt2_are_in_the_report() -> None:
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    report = convert(transformers.GPT2Model(config), prune="magnitude", force=True)
    shapes = {row.name: row.shape for row in report}
    assert shapes == {
        "h.0.attn.c_attn": (96, 32),
        "h.0.attn.c_proj": (32, 32),
        "h.0.mlp.c_fc": (128, 32),
        "h.0.mlp.c_proj": (32, 128),
    }
    assert {row.reason for row in report} == {
        "transformers.pytorch_utils.Conv1D is not a torch.nn.Linear; not pruned"
    }


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_reads_the_weight_of_a_layer_says_so() -> None:
    config = transformers.MambaConfig(
        vocab_size=99, hidden_size=32, state_size=8, num_hidden_layers=1
    )
    model = transformers.MambaForCausalLM(config).eval()
    convert(model, include="*.dt_proj", prune="magnitude", force=True)
    with pytest.raises(TypeError, match=r"Sparse24Panels has no '@': it is the sparse weight of"):
        model(torch.arange(6)[None])
