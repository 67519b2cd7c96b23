"""Units of programs, groups of subtokens, tokenizers and collators that give them, and what merging would save."""

import pickle
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from downriver.compress import add_token_merging
from downriver.compress.token_merging import flops
from downriver.core.errors import InputError, MissingExtra
from downriver.domains.code import DataCollatorWithGroups, GroupingTokenizer, SubtokenGrouper, merge_stats, split
from downriver.models import bpe_tokenizer, byte_tokenizer, small

PYTHON = '''import os.path
class Café_Bar(Base):
    """a docstring
    of two lines"""
    def read_lines(self, size=0x1F):  # read_lines of a comment
        return f"{self.size}" + 'some text' if not size else café ** 2
'''
JAVA = """public class LineReader { int lineCount = 0x1F; /* a lineCount */
  List<String> readLines(char c) { return "a lineCount" + 'c' + this.lineCount; } }
"""
C = "static int my_func(struct foo *my_ptr) { return my_ptr->bar_baz >> 2; } // my_func\n"
KNOWN = {
    "python": (PYTHON, "os path Café_Bar Base read_lines self size size café"),
    "java": (JAVA, "LineReader lineCount List String readLines c lineCount"),
    "c": (C, "my_func foo my_ptr my_ptr bar_baz"),
}
GROUPED = [("python", "stdlib"), *((language, lexer) for language in KNOWN for lexer in ("regex", "pygments"))]
GROUPED += [(language, "tree-sitter") for language in KNOWN]


def lexer_or_skip(language, lexer):
    if lexer == "pygments":
        pytest.importorskip("pygments")
    if lexer == "tree-sitter":
        pytest.importorskip("tree_sitter")
        pytest.importorskip(f"tree_sitter_{language}")


def pieces(text, kind, *arguments):
    return [text[unit.start : unit.end] for unit in split(text, *arguments).units if unit.kind == kind]


@pytest.fixture(scope="module")
def sources():
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files[10:22]]


@pytest.fixture(scope="module")
def bpe(sources):
    return bpe_tokenizer(sources, 600, context=10_000)


# Units


@pytest.mark.parametrize(("language", "lexer"), GROUPED)
def test_every_lexer_finds_the_names(language, lexer):
    lexer_or_skip(language, lexer)
    text, names = KNOWN[language]
    found = pieces(text, "identifier", language, lexer)
    if (language, lexer) == ("python", "pygments"):
        found.remove("self"), found.remove("size")  # it looks into the f-string
    assert found == names.split()
    assert split(text, language, lexer).parse_ok
    keywords = {"python": "return", "java": "class", "c": "struct"}
    assert keywords[language] in pieces(text, "keyword", language, lexer)
    assert not any("comment" in piece for piece in pieces(text, "identifier", language, lexer))


@pytest.mark.parametrize("lexer", ["stdlib", "regex", "pygments", "tree-sitter"])
def test_units_tile_the_text(lexer, sources):
    lexer_or_skip("python", lexer)
    for text in [*sources[:4], PYTHON, "", "\n", "x", "# only\r\n", "\tx = 'ü€𝄞'; é = 1 # ö"]:
        units = split(text, "python", lexer).units
        assert "".join(text[unit.start : unit.end] for unit in units) == text
        assert all(unit.start < unit.end for unit in units)


def test_regular_expressions_read_python_as_its_own_tokenizer_does(sources):
    for text in sources:
        expected, found = (split(text, "python", lexer) for lexer in ("stdlib", "regex"))
        assert expected.parse_ok
        for kind in ("identifier", "keyword", "literal"):
            mine, own = ({u for u in units.units if u.kind == kind} for units in (found, expected))
            assert len(mine ^ own) <= 0.002 * len(own), kind


def test_tree_sitter_agrees_with_the_standard_library(sources):
    lexer_or_skip("python", "tree-sitter")
    for text in sources[:6]:
        expected, found = (
            {unit for unit in split(text, "python", lexer).units if unit.kind == "identifier"}
            for lexer in ("stdlib", "tree-sitter")
        )
        assert len(expected ^ found) <= 0.002 * len(expected)


@pytest.mark.parametrize(
    "bad", ["def f(:\n  'open", "a $ b", "x\n  y\n z", 's = """never', "if x then y ?", "\ud800", "\x00", "(]" * 9]
)
def test_bad_programs_are_read_all_the_same(bad):
    found = split(bad)
    assert "".join(bad[unit.start : unit.end] for unit in found.units) == bad
    if bad != "(]" * 9 and not (bad.startswith("x\n") and sys.version_info < (3, 11)):
        assert not found.parse_ok and not SubtokenGrouper().parse_ok(bad)
    assert split(bad, lexer="regex").parse_ok


def test_the_tree_says_what_does_not_parse():
    lexer_or_skip("java", "tree-sitter")
    assert not split("class { int = ;", "java", "tree-sitter").parse_ok
    assert pieces("class { int myName = ;", "identifier", "java", "tree-sitter") == ["myName"]


def test_the_tree_calls_names_by_other_names():
    lexer_or_skip("c", "tree-sitter")
    text = "#define LONG_NAME other_name\nuint32_t my_func(int a) { return 1; }"
    assert pieces(text, "identifier", "c", "tree-sitter") == ["LONG_NAME", "other_name", "uint32_t", "my_func", "a"]


@given(st.text(max_size=60))
def test_any_text_is_tiled_and_grouped(text):
    for language in ("python", "java"):
        assert "".join(text[u.start : u.end] for u in split(text, language).units) == text
    offsets = [(i, i + 1) for i in range(len(text))]
    groups = SubtokenGrouper(units="all")(text, offsets)
    assert all(b - a in (0, 1) for a, b in zip([-1, *groups], groups, strict=False))


# Groups


def test_groups_are_runs_of_subtokens_of_one_name(bpe):
    encoded = bpe(PYTHON, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    groups = SubtokenGrouper()(PYTHON, offsets)
    assert len(groups) == len(offsets) and groups[0] == 0 and groups[-1] == groups[-2] + 1
    members = {}
    for group, (start, end) in zip(groups, offsets, strict=True):
        members.setdefault(group, []).append((start, end))
    assert list(members) == list(range(len(members)))  # monotone, without gaps
    names = [PYTHON[u.start : u.end] for u in split(PYTHON).units if u.kind == "identifier"]
    merged = [PYTHON[places[0][0] : places[-1][1]].strip() for places in members.values() if len(places) > 1]
    assert merged and set(merged) <= set(names)
    assert "read_lines" in merged and merged.count("read_lines") == 1  # the comment's stays in pieces
    for name in merged:
        assert "\n" not in name


def test_all_units_and_what_stays_single():
    text = "if number == 10: x = 'abc'  # note\n    '''two\nlines'''"
    offsets = [(i, i + 1) for i in range(len(text))]
    groups = SubtokenGrouper(units="all")(text, offsets)

    def group_of(part):
        start = text.index(part)
        return len({groups[i] for i in range(start, start + len(part))})

    assert [group_of(part) for part in ("if", "number", "==", "10", "'abc'")] == [1] * 5
    assert group_of("# note") == 6 and group_of("  #") == 3 and group_of("\n    ") == 5
    assert group_of("'''two\nlines'''") == 15  # a literal across lines
    names = SubtokenGrouper()(text, offsets)
    assert len(set(names)) == len(text) - len("number") + 1


def test_the_space_before_a_word_does_not_count():
    text = "a  long_name\n  other_name"
    grouper = SubtokenGrouper()
    assert grouper(text, [(0, 1), (1, 2), (2, 7), (7, 12), (12, 20), (20, 25)]) == [0, 1, 2, 2, 3, 4]
    assert grouper("abc.cd", [(0, 1), (1, 2), (2, 4), (4, 6)]) == [0, 0, 1, 2]  # «c.» crosses a border of units
    with pytest.raises(InputError, match=r"\(20, 40\) lies outside a text of 25"):
        grouper(text, [(20, 40)])


def test_characters_of_several_bytes_share_a_place():
    tokenizer = SubtokenGrouper().tokenizer(byte_tokenizer(64))
    encoded = tokenizer("é_ü = 1")
    assert encoded["group_ids"] == [0, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["roberta", "wordpiece"])
def test_tokenizers_of_other_kinds(kind, sources):
    from tokenizers import models, pre_tokenizers, processors, trainers

    if kind == "roberta":  # offsets without the leading space, as in CodeBERT's and CodeT5's tokenizers
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.post_processor = processors.ByteLevel(trim_offsets=True)
        made.train_from_iterator(sources[:2], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
        made.train_from_iterator(sources[:2], trainer)
    tokenizer = SubtokenGrouper().tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=made))
    encoded = tokenizer("self.some_long_name = another")
    places, groups = encoded.encodings[0].offsets, encoded["group_ids"]
    name = [group for group, (start, _) in zip(groups, places, strict=True) if 5 <= start < 19]
    assert len(name) > 1 and len(set(name)) == 1 and len(set(groups)) < len(groups)


# Tokenizer and collator


def test_a_tokenizer_with_groups(bpe):
    tokenizer = SubtokenGrouper().tokenizer(bpe)
    texts = [PYTHON, "some_name = other_name", ""]
    plain, found = (
        t(texts, padding=True, truncation=True, max_length=60, return_tensors="pt") for t in (bpe, tokenizer)
    )
    assert torch.equal(plain["input_ids"], found["input_ids"])
    assert ((found["group_ids"] >= 0) == plain["attention_mask"].bool()).all()
    for row in range(3):
        own = tokenizer(texts[row], truncation=True, max_length=60)["group_ids"]
        assert found["group_ids"][row][: len(own)].tolist() == own
    left = tokenizer(texts, padding=True, padding_side="left", return_tensors="np")["group_ids"]
    assert left[1, 0] == -1 and left[1, -1] == max(tokenizer(texts[1])["group_ids"])
    tokenizer.truncation_side = "left"
    assert (bpe.truncation_side, "truncation_side" in vars(tokenizer)) == ("left", False)
    bpe.truncation_side = "right"
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.decode([70])) == (len(bpe), 0, bpe.decode([70]))
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again(PYTHON)["group_ids"] == tokenizer(PYTHON)["group_ids"]


def test_pairs_are_grouped_by_themselves(bpe):
    tokenizer = SubtokenGrouper().tokenizer(bpe)
    pair = tokenizer("some_name", "name_more = 1")
    first, second = tokenizer("some_name")["group_ids"], tokenizer("name_more = 1")["group_ids"]
    last = first[-1]  # the end between the two is a group of its own
    assert pair["group_ids"] == [*first, *[last + group for group in second[1:]]]


def test_what_tokenizers_are_refused(bpe):
    grouper = SubtokenGrouper()
    with pytest.raises(InputError, match="a fast tokenizer is expected"):
        grouper.tokenizer(object())
    with pytest.raises(InputError, match="group_ids already"):
        grouper.tokenizer(grouper.tokenizer(bpe))
    for texts in ([("a", "b")], [3], None):
        with pytest.raises(InputError, match="texts are expected"):
            grouper.tokenizer(bpe)(texts)
    with pytest.raises(InputError, match="return_overflowing_tokens is True"):
        grouper.tokenizer(bpe)("x", return_overflowing_tokens=True)
    with pytest.raises(InputError, match="unknown return_tensors 'tf'"):
        grouper.tokenizer(bpe)("x", return_tensors="tf")


def test_rows_grouped_once_make_the_same_batches(bpe):
    tokenizer = SubtokenGrouper().tokenizer(bpe)
    texts = [PYTHON, "some_name = other_name", C]
    rows = Dataset.from_dict({"text": texts, "label": [0, 1, 0]})
    encoded = rows.map(lambda batch: dict(tokenizer(batch["text"])), batched=True, remove_columns="text")
    batch = DataCollatorWithGroups(tokenizer)(list(encoded))
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["labels"].tolist() == [0, 1, 0]
    for name in ("input_ids", "attention_mask", "group_ids"):
        assert torch.equal(batch[name], expected[name])
    padded = tokenizer(texts, padding="max_length", max_length=300)
    rows = [{name: padded[name][i] for name in ("input_ids", "attention_mask", "group_ids")} for i in range(3)]
    again = DataCollatorWithGroups(tokenizer)(rows)
    assert again["group_ids"].tolist() == padded["group_ids"]
    translation = transformers.DataCollatorForSeq2Seq(bpe)
    pairs = [
        {"input_ids": row["input_ids"], "group_ids": row["group_ids"], "labels": [1, 2][: i + 1]}
        for i, row in enumerate(list(encoded)[:2])
    ]
    batch = DataCollatorWithGroups(bpe, translation)(pairs)
    assert batch["labels"].tolist() == [[1, -100], [1, 2]] and batch["group_ids"].shape == batch["input_ids"].shape
    with pytest.raises(InputError, match="row 0 of a batch has no group_ids"):
        DataCollatorWithGroups(bpe)([{"input_ids": [1]}])
    with pytest.raises(InputError, match="1 group_ids and 2 input_ids"):
        DataCollatorWithGroups(bpe)([{"input_ids": [1, 2], "group_ids": [0]}])


def test_a_trainer_of_transformers_merges(bpe, tmp_path):
    """The path without downriver's own models: encode once, collate, transformers' Trainer."""
    tokenizer = SubtokenGrouper().tokenizer(bpe)
    rng = random.Random(0)
    texts = [f"first_name_{i} = {rng.random()}" if i % 2 else f"print(second_thing_{i})" for i in range(24)]
    rows = Dataset.from_dict({"text": texts, "labels": [i % 2 for i in range(24)]})
    rows = rows.map(lambda batch: dict(tokenizer(batch["text"])), batched=True, remove_columns="text")
    config = transformers.RobertaConfig(
        vocab_size=len(bpe),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
    )
    model = add_token_merging(transformers.RobertaForSequenceClassification(config), mode="learned")
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-2,
        use_cpu=True,
        per_device_eval_batch_size=8,
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows, data_collator=DataCollatorWithGroups(tokenizer))
    trainer.train()
    assert model.roberta.token_merge.u.weight.abs().sum() > 0
    assert trainer.predict(rows).predictions.shape == (24, 2)


# Statistics


def test_what_merging_would_save(bpe, sources):
    stats = merge_stats(sources[:4], bpe, progress=False)
    row = stats.table.row(0, named=True)
    encoded = SubtokenGrouper().tokenizer(bpe)(sources[0])
    assert (row["subtokens"], row["groups"]) == (len(encoded["input_ids"]), encoded["group_ids"][-1] + 1)
    assert row["units"] == sum(unit.kind != "other" for unit in split(sources[0]).units) and row["parse_ok"]
    base = transformers.RobertaConfig()
    expected = 1 - flops(base, [row["subtokens"]], [row["groups"]]) / flops(base, [row["subtokens"]])
    assert row["saving"] == pytest.approx(expected[0])
    assert stats.ratio == stats.table["groups"].sum() / stats.table["subtokens"].sum() < 0.95
    assert stats.saving["median"] <= stats.saving["95 %"] < 1 and stats.saving["mean"] > 0.05
    more = merge_stats(sources[:4], bpe, SubtokenGrouper(units="all"), progress=False)
    assert (more.table["groups"] < stats.table["groups"]).all()
    later = add_token_merging(small("text-encoder", "nano"), layer=1)
    assert merge_stats(sources[:1], bpe, model=later, progress=False).saving["mean"] < row["saving"] * 0.9


def test_cutting_texts_is_no_saving(bpe, sources):
    stats = merge_stats(sources[:4], bpe, max_length=50, progress=False)
    assert (stats.table["subtokens"] == 50).all() and (stats.table["groups"] < 50).any()
    assert (stats.table["units"] <= 50).all()
    merged = bpe_tokenizer(["x"], 260)
    assert np.allclose(merge_stats(["+ - 1"], merged, progress=False).table["saving"], 0)
    word = Tokenizer(WordLevel({"x": 0}, unk_token="x"))
    nothing = merge_stats(["", "x"], transformers.PreTrainedTokenizerFast(tokenizer_object=word), progress=False)
    assert nothing.table.select("subtokens", "saving").rows() == [(0, 0.0), (1, 0.0)]
    with pytest.raises(InputError, match="texts are empty"):
        merge_stats([], bpe)
    with pytest.raises(InputError, match="several are expected"):
        merge_stats("x = 1", bpe)


def test_groupers_that_cannot_be_had(monkeypatch):
    with pytest.raises(InputError, match="unknown units 'names'"):
        SubtokenGrouper(units="names")
    with pytest.raises(InputError, match="unknown lexer 'antlr'"):
        SubtokenGrouper(lexer="antlr")
    with pytest.raises(InputError, match="language is 'java'"):
        SubtokenGrouper("java", lexer="stdlib")
    with pytest.raises(InputError, match="names no grouper"):
        SubtokenGrouper.of(small("text-encoder", "nano"))
    with pytest.raises(MissingExtra, match="pip install tree-sitter-cobol"):
        SubtokenGrouper("cobol", lexer="tree-sitter")
    pytest.importorskip("pygments")
    with pytest.raises(InputError, match="'klingon', which pygments does not know"):
        SubtokenGrouper("klingon", lexer="pygments")
    assert SubtokenGrouper("java").settings() == {"language": "java", "lexer": "regex", "units": "identifier"}


def test_a_model_keeps_its_grouper():
    grouper = SubtokenGrouper("c", units="all")
    model = add_token_merging(small("text-encoder", "nano"), grouper)
    assert isinstance(model.processor, GroupingTokenizer) and SubtokenGrouper.of(model) == grouper
