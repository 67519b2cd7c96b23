"""A few positions' logits equal the full forward pass's, whatever the architecture."""

import pytest
import torch
import transformers

from downriver.core.errors import InputError
from downriver.models import small
from downriver.nn.selected_logits import logits_at

SIZE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZE)),
        lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZE)),
        lambda: transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
        ),
        lambda: small("causal-lm", "nano").backbone,
    ],
)
def test_equals_the_full_pass(make):
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(4, 50, (3, 9))
    chosen = torch.rand(3, 9) < 0.3
    with torch.no_grad():
        full, few = model(input_ids=ids).logits, logits_at(model, chosen, input_ids=ids)
    assert torch.allclose(few, full[chosen], atol=1e-6) and len(few) == chosen.sum()
    assert not model.get_output_embeddings()._forward_pre_hooks  # nothing stays behind


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(InputError, match="Linear has no output layer"):
        logits_at(torch.nn.Linear(2, 2), torch.ones(1, 1, dtype=torch.bool))
