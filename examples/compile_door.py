"""The `torch.compile` door: one budget for a model with a graph break, and eager's numbers under it.

python examples/compile_door.py
"""

import torch
from memplan.backends.compile.ledger import ledger_of
from memplan.planner.ir.units import show_bytes
from torch import nn


class Tower(nn.Module):
    """Residual layers; Dynamo breaks the graph in the middle, where the model looks at a value."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.first = nn.Sequential(*(self.layer(width) for _ in range(layers)))
        self.second = nn.Sequential(*(self.layer(width) for _ in range(layers)))

    @staticmethod
    def layer(width: int) -> nn.Module:
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if not x.isfinite().all():
            raise ValueError("the activations have overflowed")
        return self.second(x).square().mean()


def step(called: nn.Module, model: nn.Module, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss and all gradients of one step."""
    torch.manual_seed(1)
    loss = called(x)
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    return loss.item(), gradients


def main() -> None:
    torch.manual_seed(0)
    model, x = Tower(2, 64), torch.randn(2048, 64)
    loss, gradients = step(model, model, x)
    print(f"{'budget':>8}  {'piece':44}  {'unplanned':>10}  {'planned':>10}  {'repeated':>8}  same numbers")
    for budget in ("64MiB", "16MiB"):
        torch._dynamo.reset()
        options = {"budget": budget, "time_limit": 5.0}
        compiled = torch.compile(model, backend="memplan", options=options)
        for _ in range(2):  # in the second step all pieces are known, and share what is left
            found = step(compiled, model, x)
        same = found[0] == loss and torch.equal(found[1], gradients)
        for visit in ledger_of(options).step:
            code = visit.code
            before, after = show_bytes(code.planner.unplanned.peak), show_bytes(code.side.peak)
            print(f"{budget:>8}  {code.program.name:44}  {before:>10}  {after:>10}  {code.side.report.repeated:>8}  "
                  f"{'yes' if same else 'NO'}")  # fmt: skip


if __name__ == "__main__":
    main()
