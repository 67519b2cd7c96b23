"""Every kind of model as named tensors: adapters row by row, heads beside a backbone, tied names."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from downriver import models
from downriver.core.errors import InputError
from downriver.merge import Ties, merge, open_store, ties
from downriver.merge.stores import Store


def bert() -> transformers.BertModel:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    return transformers.BertModel(transformers.BertConfig(**sizes))


def whole(store: Store, name: str) -> Tensor:
    shape = store.shape(name)
    return store.read(name, 0, shape.numel() if isinstance(shape, torch.Size) else torch.Size(shape).numel()).reshape(
        shape
    )


def adapted(folder: Path, **settings: object) -> tuple[Path, Path, dict[str, Tensor]]:
    """A base and a LoRA adapter on disk, and the weights that peft makes of both."""
    bert().save_pretrained(folder / "base")
    base = transformers.BertModel.from_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "dense"], **settings)  # type: ignore[arg-type]
    tuned = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.normal_()
    tuned.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", tuned.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 9}}]
)
def test_a_lora_adapter_equals_what_peft_makes_of_it(tmp_path: Path, settings: dict[str, object]) -> None:
    base, adapter, expected = adapted(tmp_path, **settings)
    store = open_store((base, adapter))
    name = "encoder.layer.1.attention.self.query.weight"
    for n in store.names():
        torch.testing.assert_close(whole(store, n), expected[n], rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole(store, name), whole(open_store(base), name))
    assert torch.equal(store.read(name, 5, 77), whole(store, name).reshape(-1)[5:77])  # across rows, bit for bit


def test_adapters_merge_with_their_base(tmp_path: Path) -> None:
    base, adapter, expected = adapted(tmp_path)
    merge([(base, adapter)], base, Ties(density=1.0), tmp_path / "out")
    merged = transformers.AutoModel.from_pretrained(tmp_path / "out").state_dict()
    for n, value in expected.items():
        torch.testing.assert_close(merged[n], value, rtol=1e-5, atol=1e-6)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, use_dora=True)
    with pytest.raises(InputError, match="DoRA"):
        open_store((base, adapter))
    with pytest.raises(InputError, match="adapter_config"):
        open_store((base, base))
    with pytest.raises(InputError, match="is no model"):
        open_store(3)  # type: ignore[arg-type]


def test_an_adapter_inside_a_module_is_merged_in_a_copy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4))
    tuned = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    assert open_store(tuned).names() == open_store(net).names()
    assert any("lora" in n for n, _ in tuned.named_parameters())


def test_a_model_in_memory_and_its_folder_are_the_same(tmp_path: Path) -> None:
    model = models.small("text-encoder", "nano")
    model.head = nn.Linear(32, 3)
    model.save(tmp_path / "saved")
    here, there = open_store(model), open_store(tmp_path / "saved")
    assert set(there.names()) <= set(here.names()) and "downriver_head.weight" in there.names()
    assert all(torch.equal(whole(here, n), whole(there, n)) for n in there.names())


def test_merged_models_keep_their_type_and_head(tmp_path: Path) -> None:
    base = models.small("text-encoder", "nano")
    base.head = nn.Linear(32, 3)
    tuned = models.small("text-encoder", "nano", seed=1)
    tuned.head = nn.Linear(32, 3)
    merged = ties([tuned], base, density=1.0)
    assert isinstance(merged, models.Model) and merged.processor is base.processor
    assert all(torch.equal(v, tuned.state_dict()[n]) for n, v in merged.state_dict().items())
    for name, model in (("base", base), ("tuned", tuned)):
        model.save(tmp_path / name)
    merge([tmp_path / "tuned"], tmp_path / "base", Ties(density=1.0), tmp_path / "out")
    merge([tuned], base, Ties(density=1.0), tmp_path / "again")
    for out in ("out", "again"):
        loaded = models.load(tmp_path / out)
        assert all(torch.equal(v, tuned.state_dict()[n]) for n, v in loaded.state_dict().items())


def test_fingerprints_follow_the_values() -> None:
    a, b = torch.zeros(1000), torch.zeros(1000)
    assert open_store({"w": a}).fingerprint() == open_store({"w": b}).fingerprint()
    b[-1] = 1
    assert open_store({"w": a}).fingerprint() != open_store({"w": b}).fingerprint()


@pytest.mark.parametrize("kind", ["causal-lm", "text-encoder"])
def test_a_model_with_an_adapter_is_its_merged_weights(kind):
    """peft nests two wrappers that both know how to merge; only the outer one is asked."""
    model = models.small(kind, "nano")
    targets = ["q_proj"] if kind == "causal-lm" else ["query"]
    model.backbone = peft.get_peft_model(model.backbone, peft.LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    plain = models.small(kind, "nano")
    store, bare = open_store(model), open_store(plain)
    assert set(store.names()) == set(bare.names())
    changed = [n for n in bare.names() if not torch.equal(store.read(n, 0, 10), bare.read(n, 0, 10))]
    assert changed and all(targets[0] in name for name in changed)
