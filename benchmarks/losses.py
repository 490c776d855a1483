"""Models whose losses make gradients in their own forward pass, or keep more than the graph needs: all in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[nn.Module, tuple[Tensor, ...]]
HIDDEN, VOCABULARY, TOKENS, CHUNKS = 64, 4096, 512, 8


def one_chunk(x: Tensor, weight: Tensor, target: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of some tokens, and its gradients by their hidden states and by the weight."""
    logits = torch.log_softmax(x @ weight.t(), -1)
    loss = -logits.gather(1, target[:, None]).sum() / total
    logits = logits.exp().scatter_add(1, target[:, None], torch.full_like(target[:, None], -1, dtype=x.dtype)) / total
    return loss, logits @ weight, logits.t() @ x


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of a linear layer as Liger has it: gradients are made in forward, chunk by chunk."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        losses, rows, total = [], [], torch.zeros_like(weight)
        for part, wanted in zip(x.chunk(CHUNKS), target.chunk(CHUNKS), strict=True):
            loss, row, gradient = one_chunk(part, weight, wanted, len(x))
            losses.append(loss)
            rows.append(row)
            total = total + gradient
        ctx.save_for_backward(torch.cat(rows), total)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (gradient,) = grad_outputs
        rows, total = ctx.saved_tensors
        return rows * gradient, total * gradient, None


class Masked(torch.autograd.Function):
    """ReLU that keeps the mask for its backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (gradient,) = grad_outputs
        (mask,) = ctx.saved_tensors
        return gradient * mask


class Scaled(torch.autograd.Function):
    """tanh(x) * y that keeps more than it has to: the result of tanh, its derivative, both operands."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        bent = torch.tanh(x)
        ctx.save_for_backward(bent, 1 - bent * bent, x, y)
        return bent * y

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (gradient,) = grad_outputs
        bent, slope, _, y = ctx.saved_tensors
        return gradient * slope * y, gradient * bent


class Net(nn.Module):
    """A small body and a head; `finish` turns the body's result, the head's weight and the target into a loss."""

    def __init__(self, finish: Callable[["Net", Tensor, Tensor], Tensor], width: int = HIDDEN, outputs: int = VOCABULARY):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.head = nn.Parameter(torch.randn(outputs, width) * 0.02)
        self.finish = finish

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.finish(self, self.body(x), target)


def tokens(finish: Callable[[Net, Tensor, Tensor], Tensor]) -> Made:
    """A head over a vocabulary."""
    torch.manual_seed(0)
    return Net(finish), (torch.randn(TOKENS, HIDDEN), torch.randint(VOCABULARY, (TOKENS,)))


def wide(finish: Callable[[Net, Tensor, Tensor], Tensor], width: int = 256, rows: int = 2048) -> Made:
    """A square head over many rows."""
    torch.manual_seed(0)
    return Net(finish, width, width), (torch.randn(rows, width), torch.randint(width, (rows,)))


def fused(net: Net, x: Tensor, target: Tensor) -> Tensor:
    """Liger's loss."""
    return LinearCrossEntropy.apply(x, net.head, target)  # type: ignore[return-value]


def rechecked(net: Net, x: Tensor, target: Tensor) -> Tensor:
    """Cross entropy chunk by chunk, each run again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        return -torch.log_softmax(some @ net.head.t(), -1).gather(1, wanted[:, None]).sum()

    pairs = zip(x.chunk(CHUNKS), target.chunk(CHUNKS), strict=True)
    return torch.stack([checkpoint(part, some, wanted, use_reentrant=False) for some, wanted in pairs]).sum() / len(x)


class Contrastive(torch.autograd.Function):
    """A contrastive loss whose gradient by the embeddings is made in forward, a block of rows at a time (GradCache)."""

    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:
        losses, rows, total = [], [], torch.zeros_like(other)
        for index, part in enumerate(x.chunk(CHUNKS)):
            wanted = torch.arange(index * len(part), (index + 1) * len(part))
            loss, row, gradient = one_chunk(part, other, wanted, len(x))
            losses.append(loss)
            rows.append(row)
            total = total + gradient
        ctx.save_for_backward(torch.cat(rows), total)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (gradient,) = grad_outputs
        rows, total = ctx.saved_tensors
        return rows * gradient, total * gradient


def contrastive(net: Net, x: Tensor, target: Tensor) -> Tensor:
    """Every row against all rows of another view."""
    return Contrastive.apply(x, F.linear(x, net.head))  # type: ignore[return-value]


def penalised(net: Net, x: Tensor, target: Tensor) -> Tensor:
    """A loss with the norm of its own gradient, which autograd makes in forward and differentiates again."""
    loss = F.cross_entropy(F.linear(torch.tanh(x), net.head), target)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


def functional(net: Net, x: Tensor, target: Tensor) -> Tensor:
    """The same by `torch.func.grad`."""

    def loss(some: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(torch.tanh(some), net.head), target)

    return loss(x) + torch.func.grad(loss)(x).square().sum()


def masked(net: Net, x: Tensor, target: Tensor) -> Tensor:
    """Masks that are kept though what they are made of is kept as well."""
    return Masked.apply(F.linear(Masked.apply(F.linear(x, net.head)), net.head)).square().mean()  # type: ignore[union-attr]


def scaled(net: Net, x: Tensor, target: Tensor) -> Tensor:
    """A function that keeps extra tensors."""
    return Scaled.apply(F.linear(x, net.head), x).square().mean()  # type: ignore[union-attr]


def fused_linear_cross_entropy() -> Made:
    return tokens(fused)


def chunked_with_checkpoints() -> Made:
    return tokens(rechecked)


def contrastive_in_blocks() -> Made:
    return wide(contrastive, 64, 1024)


def gradient_penalty() -> Made:
    return wide(penalised)


def gradient_by_func() -> Made:
    return wide(functional)


def kept_masks() -> Made:
    return wide(masked)


def kept_extras() -> Made:
    return wide(scaled)


LOSSES: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (
        fused_linear_cross_entropy, chunked_with_checkpoints, contrastive_in_blocks, gradient_penalty, gradient_by_func,
        kept_masks, kept_extras,
    )
}  # fmt: skip
