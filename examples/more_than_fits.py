"""A model whose parameters and AdamW state are larger than the budget trains within it, with AdamW's own numbers.

python examples/more_than_fits.py

Between their uses parameters and state lie in a file (in the directory MEMPLAN_OFFLOAD, else beside memplan's measurements).
"""

import copy

import memplan
import torch
from memplan.planner.ir.units import show_bytes
from torch import nn

LAYERS, WIDTH, STEPS = 12, 512, 5


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> list[float]:
    """Losses of some steps: the loop is the same for both."""
    losses = []
    for seed in range(STEPS):
        torch.manual_seed(seed)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    layers = [each for _ in range(LAYERS) for each in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))]
    plain, x = nn.Sequential(*layers), torch.randn(256, WIDTH)
    model = copy.deepcopy(plain)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = memplan.plan(
        model, "25%", (x,), loss=lambda out: out.square().mean(), optimizer=optimizer, optimizer_in_backward=True,
        allow={"recompute", "reorder", "offload"}, time_limit=20.0,
    )  # fmt: skip
    print(plan.summary())
    print(f"parameters, state and input alone: {show_bytes(plan.program.resident_bytes)}")
    found = train(plan.apply(model, optimizer=optimizer), optimizer, x)
    wanted = train(plain, torch.optim.AdamW(plain.parameters()), x)
    memplan.bring_back(model.parameters())
    same = all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    print(f"losses {'equal' if found == wanted else 'DIFFER'}, parameters {'equal' if same else 'DIFFER'} after {STEPS} steps")


if __name__ == "__main__":
    main()
