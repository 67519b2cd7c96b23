import pytest
import torch
from transformers import AutoModel

from downriver.core.errors import InputError
from downriver.models.mlp import Mlp, MlpConfig

TABLE = torch.tensor([[1.0, 100.0], [3.0, 300.0], [5.0, 200.0]])


def test_columns_are_standardised_by_the_training_table():
    net = Mlp(MlpConfig(hidden_size=8))
    net.fit_inputs(TABLE)
    scaled = (TABLE - TABLE.mean(0)) / TABLE.std(0, correction=0)
    plain = Mlp(MlpConfig(inputs=2, hidden_size=8))
    plain.load_state_dict(net.state_dict() | {"mean": torch.zeros(2), "scale": torch.ones(2)})
    torch.testing.assert_close(net(TABLE), plain(scaled))
    assert net(TABLE * torch.tensor([1.0, 0.0])).isfinite().all()


def test_the_first_layer_is_made_once_and_from_the_seed():
    one, two, other = (Mlp(MlpConfig(seed=seed)) for seed in (0, 0, 1))
    for i, net in enumerate((one, two, other)):
        torch.manual_seed(i)
        net.fit_inputs(TABLE + i)
    assert one.first.weight.equal(two.first.weight) and not one.first.weight.equal(other.first.weight)
    before = one.first.weight.clone()
    one.fit_inputs(TABLE * 9)
    assert one.first.weight.equal(before) and one.mean.equal(TABLE.mean(0))


def test_a_table_of_another_width_is_refused():
    net = Mlp(MlpConfig())
    with pytest.raises(InputError, match="does not know its number of columns"):
        net(TABLE)
    net.fit_inputs(TABLE)
    with pytest.raises(InputError, match="made for 2 columns, the task has 3"):
        net.fit_inputs(torch.zeros(4, 3))


def test_it_is_saved_as_transformers_saves(tmp_path):
    net = Mlp(MlpConfig(hidden_size=8, layers=3)).eval()
    net.fit_inputs(TABLE)
    net.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path)(TABLE).equal(net(TABLE))
