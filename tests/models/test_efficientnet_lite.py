import pytest
import torch
import torch.nn.functional as F

from downriver.models.efficientnet_lite import (
    VARIANTS,
    EfficientNetLite,
    EfficientNetLiteConfig,
    _rounded,
    _SameConv,
)


@pytest.mark.parametrize("size", [7, 8, 224, 225])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_is_that_of_tensorflow(size, kernel, stride):
    """Output of ceil(size / stride), and an odd pixel of padding on the right and below."""
    conv = _SameConv(1, 1, kernel, stride, bias=False)
    image = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    out = conv(image)
    assert out.shape[-1] == -(-size // stride)
    total = max((out.shape[-1] - 1) * stride + kernel - size, 0)
    padded = F.pad(image, (total // 2, total - total // 2) * 2)
    torch.testing.assert_close(out, F.conv2d(padded, conv.weight, stride=stride))


def test_widths_are_rounded_to_multiples_of_eight():
    assert [_rounded(w) for w in (16, 16 * 1.1, 24 * 1.1, 40 * 1.1, 320 * 1.1, 9)] == [16, 16, 24, 48, 352, 16]


def test_the_variants_have_their_published_depth():
    for (width, depth, side), blocks in zip(VARIANTS.values(), (16, 21, 21), strict=True):
        net = EfficientNetLite(EfficientNetLiteConfig(width=width, depth=depth, image_size=side))
        assert len(net.blocks) == blocks


def test_feature_maps_and_gradients():
    net = EfficientNetLite(EfficientNetLiteConfig()).train()
    (out,) = net(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (2, 1280, 2, 2) and out.min() >= 0 and out.max() <= 6
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
