"""A grafted model: what transformers computes, what a gate at 0 changes (nothing), openings, and files."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from downriver.core.errors import InputError
from downriver.domains import GraftedVLM
from downriver.domains.caption import own_decoder, small_parts
from downriver.models import word_tokenizer
from downriver.models.vocabulary import swap_vocabulary

WORDS = word_tokenizer(
    ["describe the image in french german . translate into : the red square la photo montre un chat"]
)
OTHER = word_tokenizer(["das bild zeigt the red photo la katze und ein hund"])
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def florence() -> Florence2ForConditionalGeneration:
    encoder, _ = small_parts(WORDS, width=16, layers=2)
    config = Florence2Config.from_dict(encoder.config.to_dict() | {"image_token_id": WORDS.mask_token_id})
    torch.manual_seed(0)
    return Florence2ForConditionalGeneration(config).eval()


def gemma(layers: int = 2) -> Gemma2ForCausalLM:
    torch.manual_seed(1)
    settings = {"vocab_size": len(OTHER), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "sliding_window": 8}
    ids = {name: getattr(OTHER, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return Gemma2ForCausalLM(Gemma2Config(**settings, **heads, **ids)).eval()


def inserted() -> GraftedVLM:
    torch.manual_seed(2)
    return GraftedVLM(florence(), gemma(), "inserted", tokenizer=OTHER, prompt_tokenizer=WORDS).eval()


def native() -> GraftedVLM:
    whole = florence()
    return GraftedVLM(whole, own_decoder(whole), tokenizer=WORDS, prefixes={"fr": "la photo montre"}).eval()


def opened(model: GraftedVLM) -> GraftedVLM:
    with torch.no_grad():
        for crossing in model.crossings:
            crossing.gate.fill_(0.7)
    return model


def batch(model: GraftedVLM, target: str = "la red photo") -> dict[str, torch.Tensor]:
    rows = [
        {"image": IMAGES[0], "task": "caption", "language": "fr", "target": target},
        {"image": IMAGES[1], "task": "translate", "language": "de", "source": "the red square", "target": "the red"},
    ]
    return model.collate(rows)


def test_a_florence_with_its_own_decoder_is_transformers_florence() -> None:
    whole = florence()
    model = GraftedVLM(whole, own_decoder(whole), tokenizer=WORDS).eval()
    given = batch(model)
    seen = whole.model.get_image_features(given["pixel_values"]).pooler_output.shape[1]
    ids = torch.cat([torch.full((2, seen), WORDS.mask_token_id), given["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(2, seen, dtype=torch.long), given["attention_mask"]], dim=1)
    expected = whole(
        input_ids=ids, attention_mask=mask, pixel_values=given["pixel_values"], labels=given["labels"],
        decoder_input_ids=torch.where(given["labels"] < 0, 0, given["labels"]).roll(1, 1).index_fill(
            1, torch.tensor([0]), WORDS.bos_token_id
        ),
    )  # fmt: skip
    found = model(**given)
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], expected.loss)


def test_a_gate_at_zero_leaves_the_text_only_logits() -> None:
    model = inserted()
    given = batch(model)
    start = given["labels"].masked_fill(given["labels"] < 0, OTHER.pad_token_id).roll(1, 1)
    start[:, 0] = OTHER.bos_token_id
    alone = model.decoder(input_ids=start).logits
    assert torch.equal(model(**given)["logits"], alone)
    moved = opened(model)(**given)["logits"]
    assert not torch.allclose(moved, alone, atol=1e-3)
    assert torch.equal(model.decoder(input_ids=start).logits, alone)  # nothing is left behind on the decoder


def test_gradients_reach_the_gates_the_image_and_the_prompt() -> None:
    model = opened(inserted()).train()
    given = batch(model)
    given["pixel_values"].requires_grad_()
    model(**given)["loss"].backward()
    assert all(c.gate.grad.abs() > 0 for c in model.crossings) and given["pixel_values"].grad.abs().sum() > 0
    assert model.reader.embed_tokens.weight.grad[given["input_ids"][1, 1]].abs().sum() > 0


def test_what_is_padded_does_not_count() -> None:
    for model in (native(), opened(inserted())):
        both = batch(model)
        rows = [
            {"image": IMAGES[0], "task": "caption", "language": "fr", "target": "la red photo"},
        ]
        alone = model.collate(rows)
        assert alone["input_ids"].shape[1] < both["input_ids"].shape[1]
        torch.testing.assert_close(model(**alone)["logits"][0], model(**both)["logits"][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [native, lambda: opened(inserted())])
def test_a_forced_opening_is_there_and_forcing_the_likeliest_tokens_changes_nothing(make) -> None:
    model = make()
    given = {k: v for k, v in batch(model).items() if k != "labels"}
    free = model.decode(**given, max_new_tokens=6)
    opening = model.tokenizer("the red photo", add_special_tokens=False)["input_ids"]
    forced = model.decode(**given, prefix=opening, max_new_tokens=4)
    assert all(ids[:3] == opening for ids in forced.ids)
    one = {k: v[:1] for k, v in given.items()}
    likeliest = free.ids[0][:3]
    again = model.decode(**one, prefix=likeliest, max_new_tokens=3)
    assert again.ids[0] == free.ids[0]
    torch.testing.assert_close(again.log_probability[0], free.log_probability[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [native, lambda: opened(inserted())])
def test_decoding_with_a_cache_is_decoding_without(make) -> None:
    model = make()
    given = {k: v for k, v in batch(model).items() if k != "labels"}
    found = model.decode(**given, max_new_tokens=5)
    for i, ids in enumerate(found.ids):
        ended = len(ids) < 5
        labels = torch.tensor([[*ids, *([model.tokenizer.eos_token_id] if ended else [])]])
        logits = model(**{k: v[i : i + 1] for k, v in given.items()}, labels=labels)["logits"][0]
        assert logits.argmax(-1).tolist() == labels[0].tolist()
        log_p = logits.log_softmax(-1).gather(1, labels.T).sum()
        torch.testing.assert_close(log_p, found.log_probability[i], rtol=1e-3, atol=1e-3)


def test_generate_takes_openings_by_language() -> None:
    model = native()
    assert all(
        t.startswith("la photo montre")
        for t in model.generate(IMAGES, "caption", "fr", prefix="auto", max_new_tokens=2)
    )
    assert all(
        t.startswith("un chat") for t in model.generate(IMAGES, "caption", "de", prefix="un chat", max_new_tokens=2)
    )
    texts = model.generate(IMAGES, "translate", "de", source=["the red", "red", "the"], max_new_tokens=2)
    assert len(texts) == 3 and model.training is False
    with pytest.raises(InputError, match="'de'"):
        model.generate(IMAGES, "caption", "de", prefix="auto")
    with pytest.raises(InputError, match="2 source texts for 3 images"):
        model.generate(IMAGES, "translate", "de", source=["a", "b"])
    with pytest.raises(InputError, match="needs a source"):
        model.generate(IMAGES, "translate", "de")
    with pytest.raises(InputError, match="takes no source"):
        model.prompt("caption", "de", "the red")
    with pytest.raises(InputError, match="unknown task 'capture'"):
        model.generate(IMAGES, "capture", "de")


def test_bad_parts() -> None:
    whole = florence()
    with pytest.raises(InputError, match="cross-attention of its own"):
        GraftedVLM(whole, gemma(), tokenizer=OTHER)
    with pytest.raises(InputError, match="Florence2Model"):
        GraftedVLM(gemma(), gemma(), tokenizer=OTHER)
    with pytest.raises(InputError, match="cross_attention"):
        GraftedVLM(whole, gemma(), "inside", tokenizer=OTHER)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="smoothing"):
        GraftedVLM(whole, own_decoder(whole), tokenizer=WORDS, smoothing=1.0)
    with pytest.raises(InputError, match="image_processor"):
        native().pixels([IMAGES[0].numpy()])
    with pytest.raises(InputError, match="shape"):
        native().pixels(IMAGES[0])


def test_another_family_with_cross_attention_of_its_own_and_another_width() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(OTHER), n_embd=24, n_layer=1, n_head=2, n_positions=32, add_cross_attention=True,
        bos_token_id=OTHER.bos_token_id, eos_token_id=OTHER.eos_token_id,
    )  # fmt: skip
    model = GraftedVLM(florence(), GPT2LMHeadModel(config), tokenizer=OTHER, prompt_tokenizer=WORDS).eval()
    assert model.bridge.weight.shape == (24, 16)
    given = {k: v for k, v in batch(model).items() if k != "labels"}
    one, two = (model.decode(**{k: v[i : i + 1] for k, v in given.items()}, max_new_tokens=4) for i in (0, 1))
    assert one.log_probability != two.log_probability


@pytest.mark.parametrize("make", [native, lambda: opened(inserted())])
def test_saved_and_loaded_it_is_the_same(make, tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "vlm")
    again = GraftedVLM.load(tmp_path / "vlm")
    given = batch(model)
    assert torch.equal(again(**batch(again))["logits"], model(**given)["logits"])
    assert again.prefixes == model.prefixes and again.cross_attention == model.cross_attention
    assert not list((tmp_path / "vlm").glob("*.bin"))
    with pytest.raises(InputError, match="exists already"):
        model.save(tmp_path / "vlm")
    with pytest.raises(InputError, match="no grafted model"):
        GraftedVLM.load(tmp_path)


def test_checkpoints_in_transformers_layout_are_grafted(tmp_path: Path) -> None:
    whole, writer = florence(), gemma()
    for name, model, tokenizer in (("florence", whole, WORDS), ("gemma", writer, OTHER)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    grafted = GraftedVLM.from_pretrained(tmp_path / "florence", tmp_path / "gemma").eval()
    assert torch.equal(grafted(**batch(grafted))["logits"], inserted()(**batch(inserted()))["logits"])
    swapped = GraftedVLM.from_pretrained(tmp_path / "florence", vocabulary=tmp_path / "gemma").eval()
    assert swapped.decoder.lm_head.weight.shape[0] == len(OTHER)
    plain = GraftedVLM.from_pretrained(tmp_path / "florence").eval()
    found, before = (m(**batch(m, "the red photo"))["logits"] for m in (swapped, plain))
    new, old = ([t.convert_tokens_to_ids(w) for w in ("the", "red", "photo", "la")] for t in (OTHER, WORDS))
    torch.testing.assert_close(found[:, :, new], before[:, :, old], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="brings its own"):
        GraftedVLM.from_pretrained(tmp_path / "florence", tmp_path / "gemma", vocabulary=tmp_path / "gemma")


def test_the_encoders_own_vocabulary_stays_when_the_decoders_is_swapped() -> None:
    whole = florence()
    before = whole.model.language_model.encoder.embed_tokens.weight.clone()
    writer = own_decoder(whole)
    swap_vocabulary(writer, WORDS, OTHER)
    assert torch.equal(whole.model.language_model.encoder.embed_tokens.weight, before)


def test_a_few_steps_teach_a_caption() -> None:
    torch.manual_seed(0)
    model = GraftedVLM(*small_parts(WORDS, width=16), tokenizer=WORDS).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(**batch(model))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert model.generate(IMAGES[:1], "caption", "fr") == ["la red photo"]
