import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from downriver import models
from downriver.core.errors import InputError
from downriver.core.seeds import seeded
from downriver.models.model import CAN, Model, base_state
from downriver.tasks.task import Task

TEXTS = ["the river runs", "a", "to the wide and open sea", "rain"]


def text_task(kind="text-classification", target=(0, 1, 2, 1), **changes):
    columns = {"text": TEXTS, "other": TEXTS[::-1]}
    if target is not None:
        columns["label"] = list(target)
    settings = {
        "name": "water",
        "kind": kind,
        "splits": {"train": Dataset.from_dict(columns)},
        "inputs": ("text", "other") if kind == "text-similarity" else ("text",),
        "target": None if target is None else "label",
    }
    return Task(**(settings | changes))


LM = text_task("language-modelling", None)


def rows(task):
    return list(task.splits["train"])


def batch_of(model, task):
    return model.collate(task)(rows(task))


@pytest.fixture(params=["text-encoder", "masked-lm", "causal-lm"])
def text_model(request):
    return models.small(request.param, "nano")


def test_features_do_not_depend_on_the_padding(text_model):
    task = text_task()
    together = text_model.features(**batch_of(text_model, task))
    alone = torch.cat([text_model.features(**text_model.collate(task)([row])) for row in rows(task)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert together.shape == (4, 32)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_is_what_it_says(side):
    encoder = models.small("text-encoder", "nano")
    batch = dict(encoder.processor(TEXTS, padding=True, return_tensors="pt", padding_side=side))
    hidden = encoder.backbone(**batch).last_hidden_state
    real = [h[m.bool()] for h, m in zip(hidden, batch["attention_mask"], strict=True)]
    expected = {"mean": [h.mean(0) for h in real], "last": [h[-1] for h in real], "cls": list(hidden[:, 0])}
    for pooling, values in expected.items():
        encoder.pooling = pooling
        torch.testing.assert_close(encoder.features(**batch), torch.stack(values), atol=1e-6, rtol=1e-5)
    encoder.pooling = "none"
    with pytest.raises(InputError, match="need a pooling"):
        encoder.features(**batch)


def test_classification_has_logits_and_cross_entropy(text_model):
    task = text_task()
    model = text_model.with_head(task)
    assert text_model.head is None and model.head.out_features == 3 and model.labels == task.labels
    batch = batch_of(model, task)
    out = model(**batch)
    assert list(out) == ["loss", "logits"] and out["logits"].shape == (4, 3)
    torch.testing.assert_close(
        out["loss"], F.cross_entropy(model.head(model.features(**batch)), torch.tensor([0, 1, 2, 1]))
    )
    del batch["labels"]
    assert list(model(**batch)) == ["logits"]
    out["loss"].backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())


def test_regression_has_one_output_and_squared_error(text_model):
    task = text_task("text-regression", (0.5, 1.0, 2.0, -1.0))
    model = text_model.with_head(task)
    out = model(**batch_of(model, task))
    assert out["logits"].shape == (4, 1)
    expected = ((out["logits"][:, 0] - torch.tensor([0.5, 1.0, 2.0, -1.0])) ** 2).mean()
    torch.testing.assert_close(out["loss"], expected)


def test_similarity_is_the_cosine_of_both_texts(text_model):
    task = text_task("text-similarity", (1.0, 0.0, 0.5, 0.2))
    out = text_model(**batch_of(text_model, task))
    first = text_model.features(**batch_of(text_model, text_task()))
    expected = F.cosine_similarity(first, first.flip(0))
    torch.testing.assert_close(out["logits"][:, 0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        out["loss"], F.mse_loss(expected, torch.tensor([1.0, 0.0, 0.5, 0.2])), atol=1e-5, rtol=1e-4
    )
    assert text_model.with_head(task).head is None


def test_a_causal_lm_has_the_loss_that_transformers_gives():
    lm = models.small("causal-lm", "nano")
    batch = batch_of(lm, LM)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] == batch["input_ids"])[batch["attention_mask"] == 1].all()
    ours, theirs = lm(**batch), lm.backbone(**batch)
    torch.testing.assert_close(ours["loss"], theirs.loss)
    assert ours["logits"].equal(theirs.logits)


def test_a_masked_lm_hides_by_the_rule_and_repeats_in_evaluation():
    mlm = models.small("masked-lm", "nano")
    text = "all the rivers run into the sea; yet the sea is not full. " * 2
    task = text_task(
        "language-modelling", None, splits={"train": Dataset.from_dict({"text": [f"{text}{i:03}" for i in range(300)]})}
    )
    collate = mlm.collate(task)
    plain = mlm.processor([row["text"] for row in rows(task)], truncation=True, max_length=128, return_tensors="pt")[
        "input_ids"
    ]
    batch = collate(rows(task))
    chosen = batch["labels"] != -100
    assert batch["labels"][chosen].equal(plain[chosen]) and batch["input_ids"][~chosen].equal(plain[~chosen])
    assert not chosen[:, 0].any() and not chosen[:, -1].any()  # <s> and </s>
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    hidden = batch["input_ids"][chosen] == mlm.processor.mask_token_id
    kept = batch["input_ids"][chosen] == plain[chosen]
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert all(collate(rows(task)[i : i + 1])["labels"][0].equal(batch["labels"][i]) for i in (0, 7, 299))
    loss = mlm(**{k: v[:4] for k, v in batch.items()})["loss"]
    torch.testing.assert_close(loss, mlm.backbone(**{k: v[:4] for k, v in batch.items()}).loss)
    mlm.train()
    with seeded("a"):
        first = collate(rows(task))["labels"]
    with seeded("b"):
        assert not collate(rows(task))["labels"].equal(first)
    with seeded("a"):
        assert collate(rows(task))["labels"].equal(first)


def test_every_text_has_at_least_one_token_to_predict():
    mlm = models.small("masked-lm", "nano")
    one = {"train": Dataset.from_dict({"text": ["a", "b", "no"]})}
    labels = batch_of(mlm, text_task("language-modelling", None, splits=one))["labels"]
    assert ((labels != -100).sum(dim=1) >= 1).all()


def test_texts_are_cut_at_max_length():
    encoder = models.small("text-encoder", "nano")
    encoder.max_length = 5
    assert batch_of(encoder, text_task())["input_ids"].shape == (4, 5)


def test_images_go_through_a_vision_encoder():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (28, 28), dtype=np.uint8).tolist() for _ in range(4)]
    splits = {"train": Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1]})}
    task = SimpleNamespace(
        name="dots", kind="image-classification", splits=splits, inputs=("image",), target="label", labels=("a", "b")
    )
    for kind, width in (("vit", 32), ("resnet", 16)):
        vision = models.small(kind, "nano")
        model = vision.with_head(task)
        out = model(**batch_of(model, task))
        assert out["logits"].shape == (4, 2) and model.head.in_features == width and out["loss"].isfinite()


class Wide(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.layer = nn.Linear(2, width)

    def forward(self, x):
        return self.layer(x).relu()


def table(kind="tabular-classification", target=(0, 1, 0, 1), columns=("height", "width")):
    data = {"height": [1.0, 2.0, 3.0, 4.0], "width": [10, 20, 30, 50], "label": list(target)}
    return Task("table", kind, {"train": Dataset.from_dict(data)}, columns, "label")


def test_a_module_of_your_own_takes_a_table():
    own = models.load(Wide())
    model = own.with_head(table())
    assert own.kind == "module" and model.head.in_features == 6
    assert model(**batch_of(model, table()))["logits"].shape == (4, 2)
    bare = own(**batch_of(own, table()))  # without a head its output is the logits
    torch.testing.assert_close(bare["loss"], F.cross_entropy(bare["logits"], torch.tensor([0, 1, 0, 1])))
    one = models.load(Wide(1)).with_head(table("tabular-regression", (0.1, 0.2, 0.3, 0.5)))
    assert one(**batch_of(one, table("tabular-regression", (0.1, 0.2, 0.3, 0.5))))["logits"].shape == (4, 1)


def test_a_table_with_a_hole_is_refused():
    model = models.load(Wide())
    collate = model.collate(table())
    with pytest.raises(InputError, match=r"column 'width'.*not finite"):
        collate([{"height": 1.0, "width": float("nan"), "label": 0}])
    with pytest.raises(InputError, match="column 'height' must hold numbers"):
        collate([{"height": "tall", "width": 1.0, "label": 0}])


def test_a_column_of_vectors_stands_for_as_many_columns():
    numbers = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    target = [0, 1, 0, 1, 0, 1]
    kind = "tabular-classification"
    vectors = Task(
        "v", kind, {"train": Dataset.from_dict({"x": numbers, "y": target, "z": numbers[:, 0]})}, ("x", "z"), "y"
    )
    model = models.load(nn.Identity())
    batch = model.collate(vectors)(list(vectors.rows("train")))
    np.testing.assert_array_equal(batch["inputs"].numpy(), np.column_stack([numbers, numbers[:, 0]]))
    assert model.with_head(vectors).head.in_features == 4
    with pytest.raises(InputError, match="column 'x' must hold numbers, or vectors of one length"):
        model.collate(vectors)([{"x": [1.0, 2.0], "z": 0.0}, {"x": [1.0], "z": 0.0}])


def test_a_text_that_is_none_is_refused(text_model):
    with pytest.raises(InputError, match="column 'text': None is not a text"):
        text_model.collate(text_task())([{"text": None, "label": 0}])
    with pytest.raises(InputError, match="column 'text': 3 is not a text"):
        text_model.collate(text_task())([{"text": "a", "label": 0}, {"text": 3, "label": 0}])


@pytest.mark.parametrize(
    ("small", "kind"), [("vit", "vision-encoder"), ("text-encoder", "text-encoder"), ("mlp", "module")]
)
def test_a_task_of_another_kind_is_refused(small, kind):
    model = models.small(small, "nano")
    with pytest.raises(InputError, match=rf"a {kind} model .* cannot do the language-modelling task 'water'"):
        model.with_head(LM)
    if kind == "module":
        with pytest.raises(InputError, match="needs a tokenizer"):
            model.collate(text_task())
    assert "language-modelling" not in CAN[kind]


def test_an_encoder_without_a_head_says_so():
    encoder = models.small("text-encoder", "nano")
    with pytest.raises(InputError, match="has no head"):
        encoder(**batch_of(encoder, text_task()))


def test_wrong_settings_are_refused():
    for settings, says in (
        ({"kind": "lm"}, "kind of model"),
        ({"pooling": "max"}, "pooling"),
        ({"max_length": 0}, "max_length"),
    ):
        with pytest.raises(InputError, match=says):
            Model(Wide(), **settings)


def equal(a, b):
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def round_trip(model, tmp_path, task, **options):
    """Save, load, and compare the outputs bit by bit; give back the loaded model."""
    back = models.load(model.save(tmp_path / "saved"), **options)
    with torch.no_grad():
        before, after = (m(**m.collate(task)(rows(task)))["logits"] for m in (model, back))
    assert after.equal(before)
    for name in ("kind", "pooling", "max_length", "labels"):
        assert getattr(back, name) == getattr(model, name)
    return back


def test_with_head_leaves_the_model_alone_and_follows_the_seed(text_model):
    before = {k: v.clone() for k, v in text_model.state_dict().items()}
    with seeded("head", 1):
        one = text_model.with_head(text_task())
    with seeded("head", 1):
        two = text_model.with_head(text_task())
    assert one.head.weight.equal(two.head.weight) and one.backbone is not text_model.backbone
    with torch.no_grad():
        next(one.backbone.parameters()).zero_()
    assert all(v.equal(before[k]) for k, v in text_model.state_dict().items())
    assert not text_model.train().with_head(text_task()).eval().training and text_model.with_head(text_task()).training


def test_saved_text_models_come_back_bit_by_bit(text_model, tmp_path):
    text_model.max_length = 77
    model = text_model.with_head(text_task())
    back = round_trip(model, tmp_path, text_task())
    assert equal(model, back)
    trunk = AutoModel.from_pretrained(tmp_path / "saved")
    ids = model.processor(TEXTS, padding=True, return_tensors="pt")
    assert trunk(**ids).last_hidden_state.equal(model._trunk()(**ids).last_hidden_state)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXTS)["input_ids"] == model.processor(TEXTS)["input_ids"]


def test_a_saved_lm_is_an_ordinary_checkpoint(tmp_path):
    lm = models.small("causal-lm", "nano")
    round_trip(lm, tmp_path, LM)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert equal(plain, lm.backbone)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_saved_vision_model_comes_back(kind, tmp_path):
    model = models.small(kind, "nano")
    model.head = nn.Linear(32 if kind == "vit" else 16, 3)
    pixels = model.processor([np.full((9, 9, 3), 200, np.uint8)])
    back = models.load(model.save(tmp_path / "saved"))
    assert back.processor == model.processor and back(pixel_values=pixels)["logits"].equal(
        model(pixel_values=pixels)["logits"]
    )


def test_a_saved_mlp_comes_back(tmp_path):
    model = models.small("mlp", "nano").with_head(table())
    back = round_trip(model, tmp_path, table())
    assert back.backbone.mean.tolist() == [2.5, 27.5]


def test_a_module_of_your_own_comes_back_into_an_instance(tmp_path):
    model = models.load(Wide()).with_head(table())
    round_trip(model, tmp_path, table(), module=Wide())
    with pytest.raises(InputError, match="weights of your own module"):
        models.load(tmp_path / "saved")
    with pytest.raises(InputError, match=r"does not fit the module Wide.*layer\.weight"):
        models.load(tmp_path / "saved", module=Wide(7))


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"a": "configuration that is not transformers'"}
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, pixels):
        return self.layer(pixels)


def test_a_module_of_your_own_for_images_keeps_its_processor(tmp_path):
    model = Model(Pictures(), processor=models.ImageProcessor(8, 8), source="pictures")
    back = models.load(model.save(tmp_path / "saved"), module=Pictures())
    pixels = back.processor([np.full((9, 9), 7, np.uint8)])
    assert back.processor == model.processor and pixels.shape == (1, 3, 8, 8)
    assert back.features(pixel_values=pixels).equal(model.features(pixel_values=pixels))


@pytest.mark.parametrize("lora", [False, True])
def test_half_precision_comes_back_as_it_was(lora, tmp_path):
    lm = models.load("small:causal-lm:nano:0", dtype="bfloat16")
    if lora:
        lm = adapted(lm, LM)
    back = round_trip(lm, tmp_path, LM)
    assert {p.dtype for p in back.parameters()} == {p.dtype for p in lm.parameters()} and equal(lm, back)
    assert lora or models.load(tmp_path / "saved", dtype="float32").backbone.dtype == torch.float32
    assert not (tmp_path / "saved" / "base").exists()


def adapted(model, task, **settings):
    """A model with LoRA layers that do something."""
    import peft

    model = model.with_head(task)
    config = peft.LoraConfig(r=2, target_modules=["query", "q_proj"], init_lora_weights=False, **settings)
    model.backbone = peft.get_peft_model(model.backbone, config)
    return model.eval()


def test_an_adapter_is_saved_alone_when_its_base_can_be_named(text_model, tmp_path):
    model = adapted(text_model, text_task())
    back = round_trip(model, tmp_path, text_task())
    assert not (tmp_path / "saved" / "base").exists() and (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "saved" / "downriver.json").read_text())["source"] == text_model.source
    assert equal(model, back)
    again = models.load(back.save(tmp_path / "again"))  # and once more, from what was loaded
    assert equal(model, again)


def test_an_adapter_on_a_changed_base_keeps_that_base(text_model, tmp_path):
    model = adapted(text_model, text_task(), modules_to_save=[])
    with torch.no_grad():
        next(model.backbone.get_base_model().parameters()).add_(1.0)
    back = round_trip(model, tmp_path, text_task())
    assert (tmp_path / "saved" / "base" / "config.json").exists()
    assert all(v.equal(base_state(model)[k]) for k, v in base_state(back).items())


def test_features_of_an_adapted_model_feel_the_adapter(text_model):
    model = adapted(text_model, text_task())
    batch = batch_of(model, text_task())
    with model.backbone.disable_adapter():
        plain = model.features(**batch)
    torch.testing.assert_close(plain, text_model.features(**batch))
    assert not torch.allclose(model.features(**batch), plain)


def test_a_merged_adapter_is_an_ordinary_model(text_model, tmp_path):
    model = adapted(text_model, text_task())
    expected = model(**batch_of(model, text_task()))["logits"]
    model.backbone = model.backbone.merge_and_unload()
    torch.testing.assert_close(model(**batch_of(model, text_task()))["logits"], expected, atol=1e-5, rtol=1e-4)
    round_trip(model, tmp_path, text_task())
    AutoModel.from_pretrained(tmp_path / "saved")


def test_prompt_tuning_keeps_its_virtual_tokens():
    import peft

    encoder = models.small("text-encoder", "nano")
    batch = batch_of(encoder, text_task())
    plain = encoder.features(**batch)
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    encoder.backbone = peft.get_peft_model(encoder.backbone, config).eval()
    assert encoder.features(**batch).shape == plain.shape
    assert not torch.allclose(encoder.features(**batch), plain)


def test_nothing_is_overwritten_or_half_written(tmp_path):
    model = models.small("text-encoder", "nano")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        model.save(tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["precious.txt"]
    model.head = nn.Sequential(nn.Linear(32, 2))
    with pytest.raises(InputError, match="Sequential cannot be saved"):
        model.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.head = None
    model.save(tmp_path / "saved", overwrite=True)
    assert not (tmp_path / "saved" / "precious.txt").exists() and models.load(tmp_path / "saved").kind == "text-encoder"


def test_a_head_on_every_token_learns_labels_of_tokens_and_survives_saving(tmp_path):
    model = models.small("text-encoder", "nano")
    tagger = Model(
        model.backbone, kind="text-encoder", processor=model.processor, pooling="tokens", head=torch.nn.Linear(32, 3)
    )
    batch = model.processor(["ab", "abcd"], return_tensors="pt", padding=True)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1] = 2
    out = tagger(**batch, labels=labels)
    assert out["logits"].shape == (2, 6, 3)
    expected = torch.nn.functional.cross_entropy(out["logits"][:, 1], torch.tensor([2, 2]))
    torch.testing.assert_close(out["loss"], expected)
    tagger.save(tmp_path / "tagger")
    torch.testing.assert_close(models.load(tmp_path / "tagger")(**batch)["logits"], out["logits"])
