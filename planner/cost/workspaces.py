"""Bytes that a kernel may allocate beside its results, where nothing was measured: what its source suggests."""

from collections.abc import Callable
from math import prod

from .keys import ITEMSIZE, Call, Tensor, read_key

MARGIN = 1.1  # modelled workspaces are multiplied by this: shapes round up to a kernel's blocks
# What torch gives cuBLAS to work in (aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize), once for the handle
# and the stream of each thread, at its first product.
CUBLAS_WORKSPACE = 8 << 20 | 128 << 10  # bytes, ":4096:2:16:8"
CUBLAS_WORKSPACE_HOPPER = 32 << 20  # bytes, from compute capability 9 on (of 12, only in newer versions of torch)
CUBLAS_THREADS = 2  # the one that calls the model, and autograd's, which runs the backward pass

Rule = Callable[[Call, int], float]  # the call and the bytes it writes -> workspace bytes


def nothing(call: Call, written: int) -> float:
    """The kernel works in its outputs and in registers."""
    return 0


def written_times(factor: float) -> Rule:
    """Temporaries of the output's size, as composites of elementwise kernels make them."""
    return lambda call, written: factor * written


def inputs_and_outputs(call: Call, written: int) -> float:
    """A copy of everything in the kernel's own layout: what a convolution library makes at worst."""
    return sum(tensor.bytes for tensor in call.tensors) + written


def inputs_times(factor: float) -> Rule:
    """Scratch in proportion to the input, as sorting needs it."""
    return lambda call, written: factor * sum(tensor.bytes for tensor in call.tensors)


def scattered_inputs(call: Call, written: int) -> float:
    """A compact copy of each matrix whose rows and columns both have gaps, which no BLAS reads."""
    return sum(tensor.bytes for tensor in call.tensors if scattered(tensor))


def scattered(tensor: Tensor) -> bool:
    """Whether a tensor of at least two dimensions is contiguous along neither of its last two."""
    return len(tensor.shape) >= 2 and 1 not in tensor.strides[-2:] and 1 not in tensor.shape[-2:]


def promoted_inputs(call: Call, written: int) -> float:
    """Copies in the widest type: on the CPU an elementwise kernel with mixed types converts its inputs first."""
    floating = [tensor for tensor in call.tensors if tensor.floating]
    widest = max((ITEMSIZE.get(tensor.dtype, 1) for tensor in floating), default=0)
    return sum(widest * tensor.count for tensor in floating if ITEMSIZE.get(tensor.dtype, 1) < widest)


def scores(call: Call, written: int) -> float:
    """Twice the matrix of scores, which attention without a fused kernel writes out."""
    if len(call.tensors) < 2 or any(len(tensor.shape) < 2 for tensor in call.tensors[:2]):
        return 2 * written
    query, key = call.tensors[:2]
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * ITEMSIZE.get(query.dtype, 4)


def single_precision(first: int, last: int) -> Rule:
    """Accumulators in single precision of the shapes of tensors `first` to `last` (exclusive)."""
    return lambda call, written: sum(4 * tensor.count for tensor in call.tensors[first:last])


def sorted_indices(call: Call, written: int) -> float:
    """Indices sorted with their positions, segments, and partial sums: at worst one for each row of the gradient."""
    return sum(6 * tensor.bytes if tensor.dtype == "int64" else 4 * tensor.count for tensor in call.tensors)


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv")
CONVOLUTIONS = ("convolution", "convolution_backward", "_convolution")
ELEMENTWISE = ("add", "sub", "rsub", "mul", "div", "where", "maximum", "minimum", "addcmul", "addcdiv", "lerp", "pow")
SORTS = ("sort", "topk", "argsort", "index_put", "_unsafe_index_put", "unique_dim")
COMPOSITES: dict[str, Rule] = {
    "_safe_softmax": written_times(0.5),  # which rows are masked out altogether
    "_scaled_dot_product_attention_math": scores,
}
CPU_RULES: dict[str, Rule] = {
    **COMPOSITES,
    **dict.fromkeys(PRODUCTS, scattered_inputs),
    **dict.fromkeys(CONVOLUTIONS, inputs_and_outputs),  # oneDNN's blocked layouts
    **dict.fromkeys(ELEMENTWISE, promoted_inputs),
    **dict.fromkeys(SORTS, inputs_times(2)),
    "native_dropout": written_times(1),  # the mask as floats
    "native_dropout_backward": written_times(1),
    "_scaled_dot_product_flash_attention_for_cpu": written_times(0.25),  # blocks of scores for each thread
    "_scaled_dot_product_flash_attention_for_cpu_backward": written_times(0.5),
    "upsample_bilinear2d": written_times(1),
    "upsample_bicubic2d": written_times(1),
}
CUDA_RULES: dict[str, Rule] = {
    **COMPOSITES,
    **dict.fromkeys(PRODUCTS, scattered_inputs),  # cuBLAS's own: see `cublas_bytes`
    **dict.fromkeys(CONVOLUTIONS, inputs_and_outputs),  # cuDNN's transposes and workspace
    **dict.fromkeys(SORTS, inputs_times(4)),
    "_scaled_dot_product_flash_attention_backward": single_precision(1, 2),  # the query's gradient
    "_scaled_dot_product_cudnn_attention_backward": single_precision(1, 2),
    "_scaled_dot_product_efficient_attention_backward": single_precision(1, 4),
    "embedding_dense_backward": sorted_indices,
}
RULES = {"cpu": CPU_RULES, "cuda": CUDA_RULES}


def cublas_bytes(major: int) -> int:
    """Bytes that cuBLAS keeps for training steps, whatever they run: off a GPU's capacity, and no op's workspace.

    Measured workspaces are without them too, for the call that warms up takes them.

    Args:
        major: of the GPU's compute capability.
    """
    return CUBLAS_THREADS * (CUBLAS_WORKSPACE_HOPPER if major >= 9 else CUBLAS_WORKSPACE)


def modelled_workspace(key: str, written: int, device: str) -> int:
    """Bytes that an op may allocate beside its outputs, with a margin: what the source of its kernel suggests.

    Args:
        key: of the op.
        written: bytes of its outputs.
        device: `cpu` or `cuda`.
    """
    call = read_key(key)
    if call is None:
        return 0
    rule = RULES.get(device, CPU_RULES).get(call.op, nothing)
    return int(MARGIN * rule(call, written))
