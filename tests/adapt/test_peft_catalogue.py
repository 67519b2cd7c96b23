"""The catalogue: formulas against peft's counts, flags against what models do, budgets, saving, bad input."""

import importlib
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig
from torch import nn

from downriver import models
from downriver.adapt import bitfit, load_bottleneck, load_loramoe, merge_adapter
from downriver.adapt.peft_catalogue import catalogue, known, method, shape_of
from downriver.core import InputError
from downriver.models import Model, small
from downriver.models.quantised import quantised
from downriver.tasks import Task

WEIGHTS = ("bitfit", "fish_mask")  # train a part of the weights: nothing is added
ADDED = [name for name in known() if name not in WEIGHTS]
GIVEN = {"cpt": {"cpt_token_ids": [5, 6, 7]}, "alora": {"alora_invocation_tokens": [5, 6]}}
QUICK = {"vblora": {"num_vectors": 16}}
BIASED = {"beft"}  # merges where layers have a bias
LOADERS = {"bottleneck": load_bottleneck, "loramoe": load_loramoe}
DEFAULT = ("bottleneck", "cartridge", "dora", "glora", "hira", "ia3", "ln_tuning", "lokr", "lora", "loramoe", "oft")
DEFAULT += ("pissa", "prefix_tuning", "prompt_tuning", "shira", "trainable_tokens", "vera", "xlora")


@pytest.fixture(scope="module")
def task():
    rows = Dataset.from_dict({"text": [f"the river {i} runs to the sea" for i in range(24)]})
    return Task("river", "language-modelling", {"train": rows}, ("text",), None)


@pytest.fixture(scope="module")
def lm():
    """A Llama whose keys are narrower than its hidden states."""
    model = small("causal-lm", "nano")
    config = model.backbone.config
    config = type(config)(**{**config.to_dict(), "num_key_value_heads": 1, "num_hidden_layers": 2})
    torch.manual_seed(0)
    model.backbone = transformers.LlamaForCausalLM(config).eval()
    model.source = ""
    return model


@pytest.fixture(scope="module")
def trained_adapters(lm, tmp_path_factory):
    folders = {}
    lora = method("lora")
    for seed in range(2):
        model = lora.add(lm, lora.config(lm, r=2), seed=seed)
        moved(model, seed)
        folders[str(seed)] = str(model.save(tmp_path_factory.mktemp("adapters") / str(seed)))
    return folders


@pytest.fixture(scope="module")
def bases(lm):
    return {"llama": lm, "bert": small("masked-lm", "nano"), "vit": small("vit", "nano")}


def settings(name, adapters):
    given = {**GIVEN.get(name, {}), **({"adapters": adapters} if name == "xlora" else {})}
    if name == "monteclora":
        return {"monteclora_config": MontecloraConfig(buffer_size=2)}
    return given | QUICK.get(name, {})


def moved(model, seed=1):
    """Away from the start, so that an adapter that does nothing is seen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def outputs(model, task):
    torch.manual_seed(3)
    with torch.no_grad():
        if model.kind == "vision-encoder":
            return model.features(pixel_values=torch.randn(2, 3, 32, 32))
        ids = torch.randint(10, 200, (2, 12))
        ids[:, 2:4] = torch.tensor([5, 6])  # the invocation
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]


def trains(model):
    return sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        pytest.param(base, name, marks=[] if name in DEFAULT else pytest.mark.slow)
        for base in ("llama", "bert", "vit")
        for name in ADDED
    ],
)
def test_counts_and_flags(name, base, bases, task, trained_adapters, tmp_path):
    """Formula = count; unchanged at init, and merged outputs the same, just where the catalogue says; saved whole."""
    model, found = bases[base], method(name)
    if model.kind not in found.entry.kinds or (base == "vit" and found.entry.needs_data):
        if model.kind not in found.entry.kinds:
            with pytest.raises(InputError, match=f"{name} does not work on a {model.kind}"):
                found.config(model)
        return
    config = found.config(model, **settings(name, trained_adapters))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = found.add(model, config, task=task)
    assert trains(adapted) == found.parameters(model, config)
    if found.entry.peft_type:
        assert trains(adapted) == adapted.backbone.get_nb_trainable_parameters()[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # the given one stays

    plain, fresh = outputs(model, task), outputs(adapted, task)
    assert (float((fresh - plain).abs().max()) < 1e-5) == found.entry.identity

    moved(adapted)
    changed = outputs(adapted, task)
    assert float((changed - fresh).abs().max()) > 1e-6 * (name != "unilora")  # the adapter is in the way of the data
    if found.entry.mergeable and not (name in BIASED and base == "llama"):
        assert float((outputs(merge_adapter(adapted), task) - changed).abs().max()) < 1e-4
    elif found.entry.peft_type:
        with pytest.raises(InputError, match="merge"):
            merge_adapter(adapted)

    if base == "llama":
        folder = adapted.save(tmp_path / "saved")
        again = LOADERS.get(name, models.load)(folder)
        assert float((outputs(again, task) - changed).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n, entry in known().items() if entry.size],
)
def test_a_budget_is_kept_and_used(name, lm, task):
    """The size found fits the budget; where sizes are dense it uses most of it; below the least there is an error."""
    found, budget = method(name), 25000 if name in ("loramoe", "shadow") else 9000
    given = settings(name, {})
    config = found.config(lm, budget_params=budget, **given)
    assert found.parameters(lm, config) <= budget
    sizes = found.entry.sizes(shape_of(lm, []) if name in ("bottleneck", "fish_mask") else found._shape(lm, config))
    place = list(sizes).index(getattr(config, found.entry.size)) if name not in ("supertuning",) else len(sizes) - 1
    if place + 1 < len(sizes):
        config = found.config(lm, **{**given, found.entry.size: sizes[place + 1]})
        if name != "adalora":
            assert found.parameters(lm, config) > budget
    if name not in ("fish_mask", "supertuning"):
        with pytest.raises(InputError, match=f"{name} trains at least"):
            found.config(lm, budget_params=0.5, **given)


@pytest.mark.parametrize("name", ["lora", "oft", "road", "psoft", "randlora", "frod", "osf", "lokr", "prefix_tuning"])
def test_pefts_count_of_a_solved_size(name, lm):
    found = method(name)
    config = found.config(lm, budget_params=4000)
    assert trains(found.add(lm, config)) == found.parameters(lm, config) <= 4000


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("lokr", {"decompose_both": True, "r": 1}),
        ("lokr", {"decompose_factor": 4, "r": 2}),
        ("oft", {"oft_block_size": 8, "block_share": True}),
        ("boft", {"boft_block_size": 2}),
        ("glora", {"config_A_B": "vector"}),
        ("glora", {"config_C": "vector", "config_D_E": "vector"}),
        ("lily", {"stride_A": 2, "num_B": 3}),
        ("peanut", {"depth": 1}),
        ("deft", {"para": True}),
        ("tinylora", {"weight_tying": 0.5}),
        ("road", {"variant": "road_4"}),
        ("adamss", {"num_subspaces": 3, "r": 12}),
        ("supertuning", {"r": 2, "lora_alpha": 4, "sparsity": 0.9}),
        ("gralora", {"hybrid_r": 2}),
        ("osf", {"effective_rank": 0.25}),
        ("shadow", {"update_hidden_size": 5, "shadow_num_hidden_layers": 2}),
        ("cartridge", {"num_frozen_tokens": 3}),
        ("multitask_prompt_tuning", {"num_tasks": 3, "num_ranks": 2}),
        ("poly", {"n_tasks": 2, "n_skills": 3, "n_splits": 2}),
        ("p_tuning", {"encoder_hidden_size": 20}),
    ],
)
def test_counts_of_other_settings(name, given, bases):
    found = method(name)
    for base in ("llama", "bert"):
        if bases[base].kind in found.entry.kinds:
            config = found.config(bases[base], **given)
            assert trains(found.add(bases[base], config)) == found.parameters(bases[base], config)


def test_every_tuner_of_peft_is_there():
    """Every type of the installed peft has an entry."""
    assert {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == {
        entry.peft_type for entry in known().values() if entry.peft_type
    }
    table = catalogue()
    assert table.height == len(known()) and table["name"].n_unique() == table.height
    assert set(table["family"]) == {"selective", "additive", "prompt", "reparameterisation", "hybrid"}


def test_facts_of_the_installed_peft():
    """Mixed batches: what peft's own sources provide for."""
    for name, entry in known().items():
        if not entry.peft_type or entry.peft_type == "LORA" or entry.targets == "model":
            continue
        package = importlib.import_module(f"peft.tuners.{entry.peft_type.lower()}")
        files = {path.stem: path.read_text() for path in Path(package.__path__[0]).glob("*.py")}
        assert entry.mixed_batches == ("_mixed_batch_forward" in files.get("layer", "")), name


@pytest.fixture(scope="module")
def in_4_bits(lm):
    pytest.importorskip("bitsandbytes", reason="pip install 'downriver[quantised]'")
    return quantised(lm, 4)


@pytest.mark.parametrize("name", [name for name in ADDED if name != "xlora"])
def test_quantised_bases(name, in_4_bits, task, monkeypatch):
    """The flag says where the method is what it says it is, on weights in 4 bits too: count, start, gradients."""
    found, entry = method(name), known()[name]
    if not entry.quantised:
        with pytest.raises(InputError, match=f"{name} does not work on a quantised base"):
            found.add(in_4_bits, None, task=task)
        monkeypatch.setattr(in_4_bits.backbone, "is_quantized", False)  # what would happen
    torch.manual_seed(0)
    ids = torch.randint(10, 200, (2, 12))
    ids[:, 2:4] = torch.tensor([5, 6])
    try:
        config = found.config(in_4_bits, **settings(name, {}))
        adapted = found.add(in_4_bits, config, task=task)
        plain, fresh = outputs(in_4_bits, task), outputs(adapted, task)
        works = trains(adapted) == found.parameters(in_4_bits, config)
        works &= (float((fresh - plain).abs().max()) < 1e-5) == entry.identity
        moved(adapted)
        works &= float((outputs(adapted, task) - fresh).abs().max()) > 1e-6
        adapted.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)["loss"].backward()
        works &= all(p.grad is not None for p in adapted.backbone.parameters() if p.requires_grad)
    except (InputError, RuntimeError, TypeError, ValueError):
        works = False
    assert works == entry.quantised


def test_biases_of_a_quantised_base(letters):
    pytest.importorskip("bitsandbytes", reason="pip install 'downriver[quantised]'")
    base = quantised(small("text-encoder", "nano"), 4)
    tuned = bitfit(base, letters, "32 examples", batch_size=8)
    pairs = zip(base.backbone.named_parameters(), tuned.backbone.parameters(), strict=True)
    assert {name.split(".")[-1] for (name, old), new in pairs if not old.equal(new)} == {"bias"}


@pytest.mark.parametrize("name", [n for n, e in known().items() if e.targets == "linear" and e.name != "xlora"])
def test_convolutions_and_embeddings(name):
    """The flags say what peft wraps."""
    found, entry = method(name), known()[name]
    if entry.needs_data or name in ("alora", "loramoe", "poly"):
        return
    nets = {
        "convolutions": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)),
        "embeddings": nn.Sequential(nn.Embedding(16, 8)),
    }
    linear = Model(nn.Sequential(nn.Linear(8, 8)))
    sized = {"oft_block_size": 4} if name == "oft" else {"r": 4, "psoft_alpha": 4} if name == "psoft" else {}
    if name == "bdlora":
        sized = {"use_bdlora": BdLoraConfig(target_modules_bd_a=["0"], nblocks=2)}
    if name == "ia3":
        sized = {"feedforward_modules": []}
    for what, net in nets.items():
        config = found.config(linear, target_modules=["0"], **sized, **QUICK.get(name, {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = found.add(Model(net), config)
                batch = torch.randn(2, 8, 6, 6) if what == "convolutions" else torch.tensor([[1, 2, 3]])
                model.backbone(batch)
                works = trains(model) > 0
            except Exception:
                works = False
        assert works == getattr(entry, what), what


def test_bad_input(lm):
    with pytest.raises(InputError, match="did you mean 'lora'"):
        method("lra")
    lora = method("lora")
    with pytest.raises(InputError, match="setting of lora 'rank'"):
        lora.config(lm, rank=3)
    with pytest.raises(InputError, match="budget_params or r, not both"):
        lora.config(lm, budget_params=100, r=3)
    with pytest.raises(InputError, match="at least 1,408 parameters"):
        lora.config(lm, budget_params=100)
    with pytest.raises(InputError, match="no such layer"):
        lora.parameters(lm, lora.config(lm, target_modules=["nowhere"]))
    with pytest.raises(InputError, match="alora_invocation_tokens"):
        method("alora").config(lm)
    with pytest.raises(InputError, match="a task is expected"):
        method("eva").add(lm, method("eva").config(lm))
    with pytest.raises(InputError, match="takes no target_modules"):
        method("prompt_tuning").config(lm, target_modules=["q_proj"])
    for name in ("lora", "bottleneck", "loramoe"):
        other = method(name)
        with pytest.raises(InputError, match="has an adapter: the plain model"):
            lora.add(other.add(lm, other.config(lm)), lora.config(lm))
    with pytest.raises(InputError, match="does not count parameters with the setting modules_to_save"):
        lora.config(lm, budget_params=5000, modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="convolutions alone"):
        method("vera").config(small("resnet", "nano"))
    with pytest.raises(InputError, match="linear layers only"):
        lora.config(small("resnet", "nano"), budget_params=1000)


def test_texts_make_room_for_virtual_tokens(lm):
    prompts = method("prompt_tuning")
    assert prompts.config(lm, budget_params=1e9).num_virtual_tokens == 64  # half of 128
    model = prompts.add(lm, prompts.config(lm, num_virtual_tokens=100))
    assert (lm.max_length, model.max_length) == (128, 28)
    rows = Dataset.from_dict({"text": ["word " * 100]})
    task = Task("long", "language-modelling", {"train": rows}, ("text",), None)
    batch = model.collate(task)(list(rows))
    assert batch["input_ids"].shape == (1, 28) and model(**batch)["logits"].shape[:2] == (1, 28)
    with pytest.raises(InputError, match="leave no room for a text"):
        prompts.add(lm, prompts.config(lm, num_virtual_tokens=128))


def test_the_same_seed_gives_the_same_start(lm):
    lora = method("lora")
    first, second, third = (lora.add(lm, lora.config(lm), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not all(torch.equal(value, third[key]) for key, value in first.items())
