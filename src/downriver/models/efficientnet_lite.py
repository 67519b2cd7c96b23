"""EfficientNet-lite: inverted bottlenecks without squeeze-and-excitation, ReLU6, fixed stem and head.

Reach for ``models.load("efficientnet-lite0")``: three sizes of one ImageNet family that run on a CPU. Tan & Le,
*EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks*, 2019, in its "lite" form. Stochastic
depth, a regulariser of the original training, is left out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

# (blocks, kernel, stride of the first block, expansion, channels) of the seven stages at width and depth 1
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280

VARIANTS = {
    "efficientnet-lite0": (1.0, 1.0, 224),
    "efficientnet-lite1": (1.0, 1.1, 240),
    "efficientnet-lite2": (1.1, 1.2, 260),
}
"""Width multiplier, depth multiplier and image size of each variant."""


class EfficientNetLiteConfig(PreTrainedConfig):
    """Width and depth multipliers and the image size (pixels) of one variant."""

    model_type = "downriver-efficientnet-lite"

    width: float = 1.0
    depth: float = 1.0
    image_size: int = 224
    num_channels: int = 3


class EfficientNetLite(PreTrainedModel):
    """Pixels (n, 3, h, w) to feature maps (n, 1280, h/32, w/32).

    >>> net = EfficientNetLite(EfficientNetLiteConfig()).eval()
    >>> sum(p.numel() for p in net.parameters())
    3371008
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _unit(config.num_channels, _STEM, 3, stride=2)
        blocks, channels = [], _STEM
        for stage, (repeats, kernel, stride, expansion, width) in enumerate(_STAGES):
            out = _rounded(width * config.width)
            fixed = stage in (0, len(_STAGES) - 1)
            for block in range(repeats if fixed else math.ceil(repeats * config.depth)):
                blocks.append(_Bottleneck(channels, out, kernel, stride if block == 0 else 1, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = _unit(channels, _HEAD, 1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        return (self.head(self.blocks(self.stem(pixel_values))),)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            super()._init_weights(module)


class _Bottleneck(nn.Module):
    """Expand (1×1), filter each channel (k×k), project (1×1); added to its input where the shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = _unit(channels, wide, 1) if expansion != 1 else nn.Identity()
        self.depthwise = _unit(wide, wide, kernel, stride, groups=wide)
        self.project = _unit(wide, out, 1, activation=False)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "same", on which these weights were trained: an odd pixel goes right and
    below.
    """

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (s, _) = self.kernel_size, self.stride
        h, w = (max((math.ceil(size / s) - 1) * s + k - size, 0) for size in x.shape[-2:])
        return super().forward(F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)))


def _unit(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    conv = _SameConv(channels, out, kernel, stride, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out, eps=1e-3, momentum=0.01)
    return nn.Sequential(conv, norm, nn.ReLU6()) if activation else nn.Sequential(conv, norm)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8 that does not lose more than a tenth."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)
