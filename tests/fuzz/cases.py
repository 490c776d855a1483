"""Random models of quirks, and how they are called: see `quirks.py`."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from quirks import QUIRKS, TIME, WIDTH, Quirk
from torch import Tensor, nn

CLASSES, BATCH = 11, 3


class Model(nn.Module):
    """Tokens through quirks to a loss, returned in one of several ways."""

    def __init__(self, blocks: list[Quirk], returns: str, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.returns = returns

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if self.returns == "logits":
            return logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), (tokens if labels is None else labels).flatten())
        return {"loss": loss, "scalar": loss, "dict": {"loss": loss, "logits": logits}}[
            self.returns if self.returns in ("scalar", "dict") else "loss"
        ]


class Wrapper(nn.Module):
    """A module that looks like the one it holds, as wrappers of frameworks do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@dataclass(frozen=True)
class Case:
    """One random model and script, named by its seed."""

    seed: int

    def build(self) -> tuple[nn.Module, list[Quirk]]:
        """The model, the same each time, and its quirks."""
        rng = self.rng("model")
        torch.manual_seed(self.seed)
        chosen = rng.choices(QUIRKS, k=rng.randint(1, 3))
        blocks = [kind(rng) for kind in chosen]
        if rng.random() < 0.15:
            blocks.append(blocks[0])  # a block met twice
        model: nn.Module = Model(blocks, rng.choice(["scalar", "dict", "logits"]), rng.random() < 0.3)
        if rng.random() < 0.3:
            model = Wrapper(model)
        return model, blocks

    def rng(self, what: str) -> random.Random:
        """Draws for one purpose."""
        return random.Random(f"{self.seed} {what}")

    def calls(self, step: int) -> list[tuple[tuple, dict]]:
        """The calls before the backward pass of a step: mostly one."""
        rng = self.rng("script")
        count = 2 if rng.random() < 0.15 else 1
        labels = rng.random() < 0.5
        made = []
        for number in range(count):
            draws = torch.Generator().manual_seed(1000 * step + number)
            tokens = torch.randint(CLASSES, (BATCH, TIME), generator=draws)
            made.append(((tokens,), {"labels": tokens} if labels else {}))
        return made

    @property
    def loss(self) -> Callable[[Any], Tensor] | None:
        """The script's own loss, where the model returns none."""
        returns = self.rng("model")
        del returns
        model, _ = self.build()
        plain = getattr(model, "returns", "")
        return (lambda out: out.float().pow(2).mean()) if plain == "logits" else None

    @property
    def budget(self) -> str | None:
        """What the step may take."""
        return self.rng("budget").choice([None, "80%", "60%", "floor"])

    def context(self) -> AbstractContextManager[Any]:
        """Autocast around the call, now and then."""
        if self.rng("context").random() < 0.15:
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return nullcontext()

    @property
    def name(self) -> str:
        """For people: the blocks and what is special about the script."""
        model, blocks = self.build()
        own = [f"{type(block).__name__}{told(block)}" for block in blocks]
        where = " autocast" if not isinstance(self.context(), nullcontext) else ""
        return f"{self.seed}: {type(model).__name__}({', '.join(own)}), budget {self.budget}{where}"


def told(block: Quirk) -> str:
    """The choices that a block has made."""
    chosen = [f"{key}={value}" for key, value in vars(block).items() if key in ("how", "where", "by", "what", "when", "reads",
              "reentrant", "decides", "writes", "trains")]  # fmt: skip
    return f"[{', '.join(chosen)}]" if chosen else ""
