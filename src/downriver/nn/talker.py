"""What a model says of its states, and how it hears: an encoder and a decoder between a state and a message.

Reach for it where two models of unlike widths exchange states through a space of messages that both know; Zhao et al.
2023, «Talking Models» (``merge.talking_models``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downriver.core.errors import InputError

COLLAPSE = 1e-4
"""Messages that vary less than this over rows say nothing."""


class Talker(nn.Module):
    """An encoder E from states (..., width) to messages (..., message_dim), and a decoder D back, both with one hidden
    layer.

    Parameters
    ----------
    hidden
        Width of the hidden layers; by default twice ``message_dim``.

    States are normalised (no parameters) on their way in, since their scales differ between models and layers. What D
    gives has no scale that means something either: it is to be compared after ``normalised``.

    >>> talker = Talker(6, 4)
    >>> talker.encode(torch.ones(2, 6)).shape, talker.decode(torch.ones(2, 4)).shape
    (torch.Size([2, 4]), torch.Size([2, 6]))
    """

    def __init__(self, width: int, message_dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 2 * message_dim if hidden is None else hidden
        if min(width, message_dim, hidden) < 1:
            raise InputError(f"a talker of width {width}, message {message_dim}, hidden {hidden}: 1 or more expected")
        self.width, self.message_dim = width, message_dim
        norm = nn.LayerNorm(width, elementwise_affine=False)
        self.encoder = nn.Sequential(norm, nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, message_dim))
        self.decoder = nn.Sequential(nn.Linear(message_dim, hidden), nn.GELU(), nn.Linear(hidden, width))

    def encode(self, state: Tensor) -> Tensor:
        """E: what is said of a state."""
        return self.encoder(state)

    def decode(self, message: Tensor) -> Tensor:
        """D: the state that is heard in a message."""
        return self.decoder(message)


def normalised(state: Tensor) -> Tensor:
    """A state with mean 0 and variance 1 over its width: layer normalisation without parameters.

    >>> normalised(torch.tensor([[1.0, 3.0]])).round(decimals=3)
    tensor([[-1.,  1.]])
    """
    return F.layer_norm(state, state.shape[-1:])


def on_scale_of(state: Tensor, model: Tensor) -> Tensor:
    """A state with the mean and the spread, over the width, of another one.

    >>> on_scale_of(torch.tensor([[-2.0, 2.0]]), torch.tensor([[10.0, 12.0]])).round(decimals=3)
    tensor([[10., 12.]])
    """
    mean = model.mean(dim=-1, keepdim=True)
    spread = (model.var(dim=-1, keepdim=True, correction=0) + 1e-5).sqrt()  # as layer_norm has it
    return normalised(state) * spread + mean


def info_nce(x: Tensor, y: Tensor, temperature: float = 0.1) -> Tensor:
    """How well row i of x (n, d) finds row i of y among all, and the reverse: the mean cross-entropy of the cosines.

    >>> info_nce(torch.eye(3), torch.eye(3)) < info_nce(torch.eye(3), torch.eye(3).roll(1, 0))
    tensor(True)
    """
    cosines = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / temperature
    right = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(cosines, right) + F.cross_entropy(cosines.T, right)) / 2
