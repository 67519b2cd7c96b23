"""An activation that sets what it gives to zero where it is small: the sparse gate of CATS."""

import torch
from torch import Tensor, nn


class CATSActivation(nn.Module):
    """a where |a| > t, else 0, with a the values of an activation function, large negative ones kept.

    Gradients of what is dropped are zero. The threshold is not part of the state dict: it is kept in the model's
    configuration (see ``models.surgery``).

    >>> CATSActivation(nn.Identity(), 0.5)(torch.tensor([-1.0, 0.2, 0.5, 2.0]))
    tensor([-1.,  0.,  0.,  2.])
    """

    threshold: Tensor

    def __init__(self, activation: nn.Module, threshold: float) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("threshold", torch.tensor(float(threshold)), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        a = self.activation(z)
        return torch.where(a.abs() > self.threshold, a, torch.zeros((), dtype=a.dtype, device=a.device))

    def extra_repr(self) -> str:
        return f"threshold={float(self.threshold):.4g}"
