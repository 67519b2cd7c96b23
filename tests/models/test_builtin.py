import gzip
import re
import wave

import numpy as np
import pytest
import torch
import transformers

from downriver import models
from downriver.core import assets
from downriver.core.errors import InputError
from downriver.models import builtin

pytestmark = pytest.mark.assets


def converted(asset, name):
    """Load a built-in model whole, as its own class, or skip where its package or reader is not there."""
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    asset(name)
    return models.load(name, kind="module")


def test_names_are_those_of_the_models():
    names = models.builtin_names()
    assert "all-MiniLM-L6-v2" in names and "20newsgroups" not in names
    assert builtin.find("smollm2-135m-instruct").name == "SmolLM2-135M-Instruct" and builtin.find("nothing") is None
    with pytest.raises(InputError, match="unknown asset"):
        builtin.folder("nothing")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("efficientnet-lite0", 4_652_008), ("efficientnet-lite1", 5_416_680), ("efficientnet-lite2", 6_092_072)],
)
def test_efficientnet_lite_knows_a_palace(asset, name, parameters):
    """The palace of China in scikit-learn's own picture is class 698 of ImageNet."""
    from sklearn.datasets import load_sample_image

    asset(name)
    model = models.load(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad():
        logits = model(pixel_values=model.processor([load_sample_image("china.jpg")]))["logits"]
    assert logits.shape == (1, 1000) and logits.argmax().item() == 698 and logits.softmax(1).max() > 0.3


def test_efficientnet_lite_round_trip(asset, tmp_path):
    asset("efficientnet-lite0")
    model = models.load("efficientnet-lite0")
    back = models.load(model.save(tmp_path / "saved"))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert back(pixel_values=pixels)["logits"].equal(model(pixel_values=pixels)["logits"])
    assert model.source == "efficientnet-lite0" and back.source == str(tmp_path / "saved")
    assert back.processor == model.processor


def test_distilbert_tags_grammar(asset):
    model = converted(asset, "distilbert-grammar")
    assert isinstance(model.backbone, transformers.DistilBertForTokenClassification)
    assert sum(p.numel() for p in model.backbone.parameters()) == 65_354_709

    def tags(text):
        with torch.no_grad():
            best = model.backbone(**model.processor(text, return_tensors="pt")).logits.argmax(-1)[0]
        return [model.backbone.config.id2label[i] for i in best.tolist()]

    assert tags("She have a dog .") == ["$KEEP", "$KEEP", "$REPLACE_has", "$KEEP", "$KEEP", "$KEEP", "$KEEP"]
    assert set(tags("She has a dog .")) == {"$KEEP"}
    encoder = models.load("distilbert-grammar")
    assert encoder.kind == "text-encoder" and encoder.max_length == 512


@pytest.mark.slow
def test_whisper_transcribes_speech(asset):
    model = converted(asset, "whisper-tiny.en")
    root = asset("asterisk-sounds-en")
    with gzip.open(root / "doc/asterisk-core-sounds-en/core-sounds-en.txt.gz", "rt") as lines:
        spoken = dict(line.strip().split(": ", 1) for line in lines if ": " in line and line[0] != ";")
    plain = lambda text: re.sub(r"[^a-z ]", "", " ".join(text.lower().split()))  # noqa: E731
    for name in ("agent-pass", "conf-invalid", "check-number-dial-again", "cannot-complete-as-dialed"):
        with wave.open(str(root / "asterisk/sounds/en_US_f_Allison" / f"{name}.wav")) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
        sound = np.interp(np.arange(2 * len(sound)) / 2, np.arange(len(sound)), sound)  # 8 to 16 kHz
        features = model.processor(sound.astype(np.float32), sampling_rate=16000, return_tensors="pt")
        text = model.processor.batch_decode(model.backbone.generate(**features), skip_special_tokens=True)[0]
        assert plain(text) == plain(spoken[name])


def test_smollm2_knows_the_capital_of_france(asset):
    converted(asset, "SmolLM2-135M-Instruct")
    lm = models.load("smollm2-135m-instruct")
    assert (lm.kind, lm.source, lm.backbone.num_parameters()) == ("causal-lm", "SmolLM2-135M-Instruct", 134_515_008)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = lm.processor.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = lm.backbone.generate(**ids, do_sample=False, max_new_tokens=8)
    assert "Paris" in lm.processor.decode(out[0, ids["input_ids"].shape[1] :])


def test_a_model_is_converted_once(asset, monkeypatch):
    asset("efficientnet-lite0")
    first = builtin.folder("efficientnet-lite0")
    monkeypatch.setitem(builtin._CONVERTERS, "efficientnet-lite0", lambda *_: pytest.fail("converted again"))
    assert builtin.folder("efficientnet-lite0") == first
    assert first.is_relative_to(assets.cache_folder() / "models")


def test_a_file_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    """A state dict with a tensor too few leaves no converted folder."""
    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path))
    source = assets.location(assets.find("efficientnet-lite0")) / assets.find("efficientnet-lite0").root
    source.mkdir(parents=True)
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, source / "net.pth")
    with pytest.raises(InputError, match=r"net\.pth has 1 tensors: 294 are expected"):
        builtin.folder("efficientnet-lite0")
    assert not any(p.is_dir() for p in (tmp_path / "models").iterdir())
