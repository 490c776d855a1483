"""A planned step as two CUDA graphs: its tensors lie where they lay in the step before, so its kernels can be recorded once.

What a replay reads is where the recording found it: parameters and buffers are theirs, a call's inputs and the gradients that
reach the outputs are copied into tensors of the recording. What it returns lies in the arena or in the recording's own pool,
and is copied, but for gradients that are lent. A step whose parameters have moved is recorded anew.

Not yet run on a GPU: the tests replay operators that a stand-in has recorded (CUDA's rules for a capture are in the CUDA C++
Programming Guide, section CUDA Graphs; torch's in `torch.cuda.graph`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..planner.errors import MemplanError
from .codegen import Generated

WARM = 3  # steps that run as they are before one is recorded: libraries set themselves up in the first


@dataclass(frozen=True)
class Recording:
    """One function of a step, recorded.

    Attributes:
        graph: what is replayed.
        given: the tensors that it reads a call's own from.
        results: what it returns, written over by each replay.
    """

    graph: Any
    given: tuple[torch.Tensor, ...]
    results: Any

    def replay(self, given: list[torch.Tensor]) -> Any:
        """Run it for other tensors. What it returns is good until the next replay."""
        for place, value in zip(self.given, given, strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.results


def recorded(code: Generated) -> Generated:
    """The same step, recorded after `WARM` calls and replayed from then on.

    Raises:
        MemplanError: its addresses change from step to step, or it draws some random numbers twice, which a recording cannot.
    """
    if code.arena is None or code.tiers or code.homes is not None or code.updates is not None:
        raise MemplanError("CUDA graphs want a step whose addresses are all planned: plan with arena=True, without offload "
                           "and without optimizer_in_backward")  # fmt: skip
    if code.states:
        raise MemplanError("CUDA graphs cannot run a random op twice with the same numbers, and this plan does that "
                           f"{code.states} times: allow it more bytes, or set dropout to 0")  # fmt: skip
    recorder = Recorder(code)
    backward = recorder.backward if code.backward is not None else None
    return dataclasses.replace(code, forward=recorder.forward, backward=backward)


class Recorder:
    """The two functions of a step, which count their calls and record themselves."""

    def __init__(self, code: Generated):
        self.code = code
        self.own = [index for index, source in enumerate(code.arguments) if source.kind == "input"]
        self.standing = [index for index, source in enumerate(code.arguments) if source.kind != "input"]
        self.calls = 0
        self.fixed: tuple[int, ...] = ()  # addresses of what is not a call's own
        self.pool: Any = None
        self.saved: list[Any] = []
        self.steps: dict[str, Recording] = {}

    def forward(self, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
        """Outputs, and what `backward` wants to be handed."""
        fixed = tuple(inputs[index].data_ptr() for index in self.standing)
        if fixed != self.fixed:
            self.fixed, self.calls, self.saved = fixed, 0, []
            self.steps.clear()
        self.calls += 1
        if self.calls <= WARM:
            return self.code.forward(inputs)
        given = [inputs[index] for index in self.own]
        if "forward" not in self.steps:
            places = tuple(value.clone() for value in given)
            lasting = list(inputs)
            for index, place in zip(self.own, places, strict=True):
                lasting[index] = place
            graph, (outputs, self.saved) = self.record(lambda: self.code.forward(lasting))
            self.steps["forward"] = Recording(graph, places, outputs)
        outputs = self.steps["forward"].replay(given)
        return [value.clone() for value in outputs], [self]

    def backward(self, saved: list[Any], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients."""
        if not saved or saved[0] is not self:
            return self.code.backward(saved, tangents)
        if "backward" not in self.steps:
            places = tuple(value.clone() for value in tangents)
            graph, found = self.record(lambda: self.code.backward(list(self.saved), list(places)))
            self.steps["backward"] = Recording(graph, places, found)
        found = self.steps["backward"].replay(tangents)
        lent = set(self.code.lent)
        return [value if index in lent else value.clone() for index, value in enumerate(found)]

    def record(self, function: Any) -> tuple[Any, Any]:
        """A graph of the function's kernels, none of which runs now; and what it returned."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            results = function()
        self.pool = graph.pool()
        return graph, results
