"""A multi-layer perceptron for tables: standardised columns, then GELU layers.

Reach for ``models.small("mlp")``; it learns how many columns there are, and their scale, from the task.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from downriver.core.errors import InputError
from downriver.core.seeds import seeded


class MlpConfig(PreTrainedConfig):
    """Number of input columns (0: not known yet), width and number of layers, and the seed of the first layer."""

    model_type = "downriver-mlp"

    inputs: int = 0
    hidden_size: int = 64
    layers: int = 2
    seed: int = 0


class Mlp(PreTrainedModel):
    """Columns (n, inputs) to features (n, hidden_size).

    >>> net = Mlp(MlpConfig(inputs=3, hidden_size=8))
    >>> net(torch.zeros(5, 3)).shape
    torch.Size([5, 8])
    """

    config_class = MlpConfig
    main_input_name = "inputs"

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.register_buffer("mean", torch.zeros(config.inputs))
        self.register_buffer("scale", torch.ones(config.inputs))
        self.first = nn.Linear(config.inputs, width) if config.inputs else None
        later = [nn.Sequential(nn.GELU(), nn.Linear(width, width)) for _ in range(config.layers - 1)]
        self.rest = nn.Sequential(*later, nn.GELU())
        self.post_init()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.first is None:
            raise InputError("this MLP does not know its number of columns yet: with_head(task) tells it")
        return self.rest(self.first((inputs - self.mean) / self.scale))

    def fit_inputs(self, table: Tensor) -> None:
        """Take the number of columns, their means and standard deviations from a training table (n, columns).

        The first layer is made on the first call only, from the configuration's seed: two copies of one MLP that meet
        the same kind of table keep a common ancestor.
        """
        columns = table.shape[1]
        if self.first is None:
            self.config.inputs = columns
            with seeded("mlp", self.config.seed, columns):
                self.first = nn.Linear(columns, self.config.hidden_size)
                self._init_weights(self.first)
            self.mean, self.scale = table.mean(dim=0), table.std(dim=0, correction=0).clamp(min=1e-6)
        elif columns != self.config.inputs:
            raise InputError(f"this MLP was made for {self.config.inputs} columns, the task has {columns}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)


AutoConfig.register(MlpConfig.model_type, MlpConfig, exist_ok=True)
AutoModel.register(MlpConfig, Mlp, exist_ok=True)
