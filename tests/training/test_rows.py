"""TokenRows: what is refused, what a batch holds, and that a packed block keeps its documents apart."""

import datasets
import pytest
import torch

from downriver.core import InputError
from downriver.models import small
from downriver.models.features import inference
from downriver.training import TokenRows, fine_tune
from downriver.training.trainer import tokens_in


def rows(**columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"labels": [[1]]}, "input_ids is expected"),
        ({"input_ids": [[1, 2], []]}, "row 1: no token"),
        ({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3, 4]]}, "row 1: column 'labels' has 2 values"),
    ],
)
def test_bad_rows_are_named(columns, said):
    with pytest.raises(InputError, match=said):
        TokenRows("toy", {"train": rows(**columns)})


def test_padding_has_no_loss_and_further_columns_travel():
    given = rows(input_ids=[[1, 5, 6], [1, 5]], token_scores=[[0.0, 1.0, 0.5], [0.0, 2.0]], weight=[1.0, 3.0])
    batch = TokenRows("toy", {"train": given}, pad=9).collate(small("causal-lm", "nano"))(list(given))
    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, 5, 9]]
    assert batch["labels"].tolist() == [[1, 5, 6], [1, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["token_scores"].tolist() == [[0.0, 1.0, 0.5], [0.0, 2.0, 0.0]]
    assert batch["weight"].tolist() == [1.0, 3.0]


def test_positions_that_restart_keep_documents_apart():
    model = small("causal-lm", "nano")
    first, second = [1, 10, 11, 12], [1, 20, 21]
    packed = rows(input_ids=[first + second], position_ids=[[0, 1, 2, 3, 0, 1, 2]])
    longer = rows(input_ids=[first + second, [1, 5]], position_ids=[[0, 1, 2, 3, 0, 1, 2], [0, 1]])
    assert tokens_in(TokenRows("toy", {"train": longer}).collate(model)(list(longer))) == 9
    batch = TokenRows("toy", {"train": packed}).collate(model)(list(packed))
    batch.pop("labels")
    with inference(model):
        together = model(**batch)["logits"][0]
        alone = [model(input_ids=torch.tensor([ids]))["logits"][0] for ids in (first, second)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_content_decides_the_fingerprint():
    one, same, other = (
        TokenRows(name, {"train": rows(input_ids=ids)})
        for name, ids in (("a", [[1, 2], [3]]), ("b", [[1, 2], [3]]), ("a", [[1], [2, 3]]))
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_an_order_decides_which_rows_are_seen():
    given = TokenRows("toy", {"train": rows(input_ids=[[1, 5, 6, 2], [1, 200, 201, 2]])})
    model = small("causal-lm", "nano")
    first_only = fine_tune(model, given, "40 steps", batch_size=2, learning_rate=1e-2, order=lambda visit: 0)
    with inference(first_only):
        seen, unseen = (
            first_only(input_ids=ids, labels=ids)["loss"].item()
            for ids in (torch.tensor([[1, 5, 6, 2]]), torch.tensor([[1, 200, 201, 2]]))
        )
    assert seen < 1 < 4 < unseen
    with pytest.raises(InputError, match="row 2: there are 2 rows"):
        fine_tune(model, given, "2 steps", batch_size=2, learning_rate=1e-2, order=lambda visit: 2)


class Weighted(torch.nn.Module):
    """The model's loss times a factor that learns; ``broken`` ends the run at that call."""

    def __init__(self, broken: int | None = None):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))
        self._calls, self._broken = 0, broken

    def forward(self, model, batch):
        self._calls += 1
        if self._calls == self._broken:
            raise KeyboardInterrupt
        outputs = model(**batch)
        return {"loss": self.factor * outputs["loss"], "logits": outputs["logits"]}


def test_an_objective_learns_with_the_model_and_a_killed_run_continues_with_it(tmp_path):
    given = TokenRows("toy", {"train": rows(input_ids=[[1, 5, 6, 2], [1, 200, 201, 2]])})
    model = small("causal-lm", "nano")
    settings = {"batch_size": 2, "learning_rate": 1e-2, "schedule": "constant"}
    whole = Weighted()
    tuned = fine_tune(model, given, "20 steps", objective=whole, **settings)
    assert whole.factor.item() < 1.95  # a smaller factor is a smaller loss
    assert tuned.state_dict().keys() == model.state_dict().keys()

    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, given, "20 steps", objective=Weighted(broken=14), checkpoints=tmp_path, **settings)
    continued = Weighted()
    again = fine_tune(model, given, "20 steps", objective=continued, checkpoints=tmp_path, **settings)
    assert 0 < continued._calls < 16
    assert continued.factor.item() == whole.factor.item()
    torch.testing.assert_close(again.state_dict(), tuned.state_dict(), rtol=0, atol=0)
    with pytest.raises(InputError, match="objective"):
        fine_tune(model, given, "20 steps", checkpoints=tmp_path, **settings)


def test_a_batch_in_parts_is_the_same_step():
    given = TokenRows("toy", {"train": rows(input_ids=[[1, 5 + i, 60 + i, 2] for i in range(12)])})
    model = small("causal-lm", "nano")
    settings = {"batch_size": 6, "learning_rate": 1e-3}
    whole = fine_tune(model, given, "18 examples", **settings)
    parts = fine_tune(model, given, "18 examples", accumulate=3, **settings)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), atol=2e-5, rtol=0)
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), whole.parameters(), strict=True)) > 1e-3
    with pytest.raises(InputError, match="batch_size 6, accumulate 4"):
        fine_tune(model, given, "18 examples", accumulate=4, **settings)


def test_a_masked_lm_hides_fifteen_percent_of_ordinary_tokens():
    given = rows(input_ids=[[1, *range(10, 210), 2]] * 40)
    model = small("masked-lm", "nano")
    batch = TokenRows("toy", {"train": given}).collate(model.train())(list(given))
    predicted = batch["labels"] != -100
    assert predicted.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert not predicted[:, [0, -1]].any()
    hidden = batch["input_ids"][predicted] == model.processor.mask_token_id
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=0.04)
    assert torch.equal(batch["input_ids"][~predicted], torch.tensor(given["input_ids"][:])[~predicted])
