"""The command line of a benchmark that writes a table: what all of them have in common."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .models import MODELS
from .record import RESULTS, Results, answer, note_machine

Options = argparse.Namespace


class Command:
    """`python -m memplan.benchmarks.<table>`: measures what is missing, and writes results/<table>.jsonl and .md.

    Args:
        table: name of the files.
        about: the module's docstring.
        run: measures what is missing; wherever it yields, the table is written.
        render: writes the table.
        serve: answers a request in a process of its own.
        quick: changes the options for a smoke test; None where there is none.
        small: what a smoke test takes.
        forget: drops what `--fresh` forgets; default: the rows of the models asked for, or all where there are no models.
        unable: why nothing can be measured here, if so.
    """

    def __init__(
        self,
        table: str,
        about: str | None,
        run: Callable[[Results, Options], Iterable[None] | None],
        render: Callable[[Results, Path], None],
        serve: Any = None,
        *,
        quick: Callable[[Options], None] | None = None,
        small: str = "one tiny model",
        forget: Callable[[Results, Options], None] | None = None,
        unable: Callable[[Options], str | None] = lambda options: None,
    ):
        self.table, self.run, self.render, self.serve = table, run, render, serve
        self.quick, self.forget, self.unable = quick, forget or forget_models, unable
        self.parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add = self.parser.add_argument
        self.add("--out", type=Path, default=RESULTS, help=f"folder of {table}.jsonl and {table}.md")
        if quick is not None:
            self.add("--quick", action="store_true", help=f"a smoke test: {small}, results/quick")
        self.add("--fresh", action="store_true", help="forget what was measured of the same")
        self.add("--render", action="store_true", help="only write the table")
        self.add("--serve", action="store_true", help=argparse.SUPPRESS)

    def add_models(self, default: Iterable[str], known: Sequence[str] = tuple(MODELS)) -> None:
        """`--models`: names out of `known`, with `:tiny` behind one for its small version."""

        def name(text: str) -> str:
            if text.partition(":")[0] in known or text in MODELS:
                return text
            raise argparse.ArgumentTypeError(f"unknown model {text}: choose from {', '.join(known)}")

        self.add("--models", nargs="+", type=name, default=list(default), metavar="NAME", help=f"of {', '.join(known)}")

    def add_limits(self, planning: float = 60.0, process: float = 900.0) -> None:
        """`--time-limit` and `--timeout`, in seconds."""
        self.add("--time-limit", type=float, default=planning, help="seconds of planning for each, at most")
        self.add("--timeout", type=float, default=process, help="seconds for each process")

    def __call__(self) -> None:
        """Parse, measure, write."""
        options = self.parser.parse_args()
        if options.serve:
            return answer(self.serve)
        if self.quick is not None and options.quick:
            self.quick(options)
            options.out = options.out / "quick" if options.out == RESULTS else options.out
        why = None if options.render else self.unable(options)
        if why is not None:
            print(why)
            return None
        results = Results(options.out / f"{self.table}.jsonl")
        path = options.out / f"{self.table}.md"
        if not options.render:
            if options.fresh:
                self.forget(results, options)
            note_machine(results)
            for _ in self.run(results, options) or ():
                self.render(results, path)
        self.render(results, path)
        print(path)
        return None


def each_model(measure: Callable[[Results, str, Options], None]) -> Callable[[Results, Options], Iterable[None]]:
    """What runs a function for one model after the other, with a table after each."""

    def run(results: Results, options: Options) -> Iterable[None]:
        for name in options.models:
            measure(results, name, options)
            yield

    return run


def forget_models(results: Results, options: Options) -> None:
    """Drop the rows of the models asked for; all rows where the command has no models."""
    for name in getattr(options, "models", ()):
        results.drop(model=name)
    if "models" not in options:
        results.drop()


def without_cuda(options: Options) -> str | None:
    """Why a benchmark of a GPU measures nothing here."""
    import torch

    return "no CUDA device here: nothing measured" if options.device == "cuda" and not torch.cuda.is_available() else None
