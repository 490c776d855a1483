"""A planned step as two CUDA graphs: its tensors lie where they lay in the step before, so its kernels can be recorded once.

What a replay reads is where the recording found it: parameters and buffers are theirs, a call's inputs and the gradients that
reach the outputs are copied into tensors of the recording. What it returns lies in the arena or in the recording's own pool,
and is copied, but for gradients that are lent. A step whose parameters have moved is recorded anew.

No plan counts those tensors twice. So a training step has to lend its gradients; `extra_bytes` says what is left: inputs,
outputs, and the gradients that an arena cannot lend (`arena.lendable`).

Not yet run on a GPU: the tests replay operators that a stand-in has recorded (CUDA's rules for a capture are in the CUDA C++
Programming Guide, section CUDA Graphs; torch's in `torch.cuda.graph`).
"""

import dataclasses
import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...planner.ir.errors import MemplanError
from .codegen import Generated

WARM = 3  # calls of a function that run as they are before one is recorded: libraries set themselves up in the first


@dataclass(frozen=True)
class Recording:
    """One function of a step, recorded.

    Attributes:
        graph: what is replayed.
        given: the tensors that it reads a call's own from.
        results: what it returns, written over by each replay.
        lent: the indices of results that are handed out as they are; of the others, copies are.
    """

    graph: Any
    given: tuple[torch.Tensor, ...]
    results: list[torch.Tensor]
    lent: frozenset[int] = frozenset()

    def replay(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run it for other tensors. What is lent of its results is good until the next replay."""
        for place, value in zip(self.given, given, strict=True):
            place.copy_(value)
        self.graph.replay()
        return [value if index in self.lent else value.clone() for index, value in enumerate(self.results)]

    @property
    def extra(self) -> int:
        """Bytes that it holds and a step that is not recorded does not."""
        copied = [value for index, value in enumerate(self.results) if index not in self.lent]
        return sum(value.numel() * value.element_size() for value in [*self.given, *copied])


def recorded(code: Generated) -> Generated:
    """The same step, recorded after `WARM` calls and replayed from then on.

    Raises:
        MemplanError: its addresses change from step to step, or it draws some random numbers twice, which a recording cannot;
            or it lends no gradients, so that they would be there twice.
    """
    if code.arena is None or code.tiers or code.homes is not None or code.updates is not None:
        raise MemplanError("CUDA graphs want a step whose addresses are all planned: plan with arena=True, without offload "
                           "and without optimizer_in_backward")  # fmt: skip
    if code.states:
        raise MemplanError("CUDA graphs cannot run a random op twice with the same numbers, and this plan does that "
                           f"{code.states} times: allow it more bytes, or set dropout to 0")  # fmt: skip
    if code.backward is not None and not code.lent:
        raise MemplanError("CUDA graphs would keep all gradients twice, as recorded and as handed out, which no plan counts: "
                           "plan with lend_gradients=True; where none can be lent, leave cuda_graphs out")  # fmt: skip
    recorder = Recorder(code)
    backward = recorder.backward if code.backward is not None else None
    return dataclasses.replace(code, forward=recorder.forward, backward=backward)


def extra_bytes(code: Generated) -> int:
    """Bytes that a step takes beyond its plan because it has been recorded; 0 where it has not."""
    recorder = getattr(code.forward, "__self__", None)
    return sum(step.extra for step in recorder.steps.values()) if isinstance(recorder, Recorder) else 0


class Recorder:
    """The two functions of a step, which count their calls and record themselves."""

    def __init__(self, code: Generated):
        self.code = code
        self.own = [index for index, source in enumerate(code.arguments) if source.kind == "input"]
        self.standing = [index for index, source in enumerate(code.arguments) if source.kind != "input"]
        self.calls: Counter[str] = Counter()  # of each function
        self.fixed: tuple[int, ...] = ()  # addresses of what is not a call's own
        self.pool: Any = None
        self.saved: list[Any] = []
        self.steps: dict[str, Recording] = {}

    def forward(self, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
        """Outputs, and what `backward` wants to be handed."""
        fixed = tuple(inputs[index].data_ptr() for index in self.standing)
        if fixed != self.fixed:
            self.fixed, self.pool, self.saved = fixed, None, []
            self.calls.clear()
            self.steps.clear()
        if self.is_warming("forward"):
            return self.code.forward(inputs)
        given = [inputs[index] for index in self.own]
        if "forward" not in self.steps:
            places = tuple(value.clone() for value in given)
            lasting = list(inputs)
            for index, place in zip(self.own, places, strict=True):
                lasting[index] = place
            graph, (outputs, self.saved) = self.record(lambda: self.code.forward(lasting))
            self.steps["forward"] = Recording(graph, places, outputs)
        return self.steps["forward"].replay(given), [self]

    def backward(self, saved: list[Any], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients."""
        replayed = bool(saved) and saved[0] is self
        if self.is_warming("backward") or not replayed:
            return self.code.backward(list(self.saved) if replayed else saved, tangents)
        if "backward" not in self.steps:
            places = tuple(value.clone() for value in tangents)
            graph, found = self.record(lambda: self.code.backward(list(self.saved), list(places)))
            self.steps["backward"] = Recording(graph, places, found, frozenset(self.code.lent))
        return self.steps["backward"].replay(tangents)

    def is_warming(self, name: str) -> bool:
        """Count a call of a function, and say whether it is one of those before it is recorded."""
        self.calls[name] += 1
        return self.calls[name] <= WARM

    def record(self, function: Any) -> tuple[Any, Any]:
        """A graph of the function's kernels, none of which runs now; and what it returned."""
        graph = torch.cuda.CUDAGraph()
        # autograd records the backward pass in a thread of its own; what others do meanwhile is none of its business
        with undisturbed(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            results = function()
        self.pool = graph.pool()
        return graph, results


@contextmanager
def undisturbed() -> Iterator[None]:
    """A stretch in which kernels are recorded, as torch/_inductor/cudagraph_trees.py has it.

    A workspace that cuBLAS has from before would lie outside the recording's pool, and one that it gets meanwhile would be in
    use in two places if kernels outside went on with it: both are given up. Garbage collected in between could end another
    graph, or wait for the device, which a recording does not survive.
    """
    collecting = gc.isenabled()
    gc.disable()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if collecting:
            gc.enable()
