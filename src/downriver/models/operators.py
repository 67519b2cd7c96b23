"""What torch's many operators are called in a computation graph: the paper's list of types, and its extension.

Names are those of torch functions, modules and aten operators, made plain: ``Conv2d``, ``conv2d`` and ``aten.conv2d``
are all ``conv``.
"""

PAPER_TYPES = (
    "Input Output Conv Depthwise BatchNorm ReLU ReLU6 MatMul Add Mul Concat Maxpool Avgpool Sigmoid Tanh Swish GeLU"
    " Paddings Mean SpacetoBatchND BatchtoSpaceND SpacetoDepthND DepthtoSpaceND Global Identity Zero"
    " Reserved1 Reserved2 Reserved3 Reserved4 Reserved5"
)
EXTENSION = "LayerNorm RMSNorm GroupNorm Softmax Attention Embedding Deconv Resize Recurrent Pointwise Reduce"
VOCABULARY = tuple(f"{PAPER_TYPES} {EXTENSION}".split())
"""The paper's 31 types, then those added here. ``Pointwise`` is any other function of single elements, ``Reduce`` any
other reduction, ``Resize`` interpolation, ``Deconv`` transposed convolution."""

NAMES = {
    "Conv": "conv convolution",
    "Deconv": "convtranspose",
    "BatchNorm": "batchnorm",
    "LayerNorm": "layernorm",
    "RMSNorm": "rmsnorm",
    "GroupNorm": "groupnorm instancenorm",
    "ReLU": "relu leakyrelu prelu elu threshold",
    "ReLU6": "relu6 hardtanh",
    "MatMul": "linear matmul mm bmm addmm baddbmm einsum",
    "Add": "add iadd radd sub isub rsub",
    "Mul": "mul imul rmul div idiv truediv itruediv",
    "Concat": "cat concat stack",
    "Maxpool": "maxpool maxpoolwithindices adaptivemaxpool",
    "Avgpool": "avgpool adaptiveavgpool",
    "Sigmoid": "sigmoid hardsigmoid",
    "Tanh": "tanh",
    "Swish": "silu hardswish",
    "GeLU": "gelu",
    "Paddings": "pad zeropad constantpad constantpadnd reflectionpad replicationpad",
    "Mean": "mean",
    "SpacetoDepthND": "pixelunshuffle",
    "DepthtoSpaceND": "pixelshuffle",
    "Softmax": "softmax logsoftmax",
    "Attention": "multiheadattention multiheadattentionforward scaleddotproductattention",
    "Embedding": "embedding embeddingbag",
    "Resize": "interpolate upsample upsamplenearest upsamplebilinear upsamplebicubic",
    "Recurrent": "lstm gru rnntanh rnnrelu rnn",
    "Pointwise": "pow rsqrt sqrt exp log sin cos neg abs square reciprocal erf softplus mish clamp clip round floor"
    " where maskedfill eq ne lt le gt ge logicaland logicalor logicalnot and or bitwiseand bitwiseor bitwisenot"
    " maximum minimum softsign logsigmoid remainder floordivide floordiv diff",
    "Reduce": "sum max min amax amin var std norm linalgvectornorm normalize any all argmax cumsum topk",
}
TYPE_OF = {name: kind for kind, names in NAMES.items() for name in names.split()}
_NO_NODE = """
    view reshape flatten unflatten transpose permute contiguous squeeze unsqueeze expand expandas repeat
    swapaxes movedim t getitem getattr select slice narrow split splitwithsizes chunk unbind to type float half
    bfloat16 double long int bool typeas clone detach alias lifttensor liftfreshcopy liftfresh copy identity
    dropout alphadropout featuredropout dropoutfeature noop arange full fullike ones oneslike zeros zeroslike
    empty emptylike newzeros newones newfull scalartensor tensor asserttensormetadata assertasync symsize size
    dim numel roll gather index indexselect unsafeview wrapwithsetgradenabled wrapwithautocast asstrided
    repeatinterleave broadcastto viewas flip tril triu unfold
"""
NO_NODE = frozenset(_NO_NODE.split())
"""Operators that only rename, reorder or cast elements, make constants, or do nothing in evaluation."""

TURNS = frozenset(("transpose", "permute", "swapaxes", "movedim", "t"))
"""Of these, the ones after which channels may lie elsewhere."""


def plain(name: str) -> str:
    """A name in lower case, without underscores and an ending 1d, 2d or 3d.

    >>> plain("AdaptiveAvgPool2d"), plain("adaptive_avg_pool2d"), plain("add_")
    ('adaptiveavgpool', 'adaptiveavgpool', 'add')
    """
    name = name.replace("_", "").lower()
    return name[:-2] if name.endswith(("1d", "2d", "3d")) else name
