"""Programs and schedules as people read them."""

from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.schedule import Free, Placement, Run, Schedule, Start, Wait
from memplan.planner.ir.text import show_program, show_schedule

MIB = 1 << 20
DROPOUT = "aten.native_dropout.default"


def net() -> Program:
    """Dropout after a product, with everything that a line can show."""
    kinds = [Kind.PARAMETER, Kind.ACTIVATION, Kind.ACTIVATION, Kind.TEMPORARY, Kind.TEMPORARY, Kind.GRADIENT]
    names = ["w", "a", "out", "mask", "tangent", "w.grad"]
    sizes = [3 * MIB // 2, MIB, MIB, 1024, MIB, 3 * MIB // 2]
    phases = Phase.FORWARD, Phase.FORWARD, Phase.LOSS, Phase.BACKWARD
    ops = (
        Op("mm", "aten.mm.default", "mm", phases[0], (0,), (1,), seconds=1.5e-3, workspace=2048, where="net.0"),
        Op(
            "drop",
            "aten.native_dropout.default",
            "d",
            phases[1],
            (1,),
            (2, 3),
            reuse=((2, 1),),
            random=True,
            where="net.1",
        ),
        Op("loss", "loss", "loss", phases[2], (2,), (4,), repeatable=False),
        Op("mm_1", "aten.mm.default", "mm_1", phases[3], (4, 0), (5,), mutates=(0,), seconds=3e-3, where="net.0"),
    )
    buffers = tuple(Buffer(*facts) for facts in zip(names, sizes, kinds, strict=True))
    return Program("net", buffers, ops, (5,))


def test_a_program_lists_buffers_ops_by_phase_and_outputs():
    expected = """\
program net on cpu: 4 ops, 6 buffers, 1.5 MiB resident
buffers
  %0  parameter   1.5 MiB        w
  %1  activation  1 MiB    op 0  a
  %2  activation  1 MiB    op 1  out
  %3  temporary   1 KiB    op 1  mask
  %4  temporary   1 MiB    op 2  tangent
  %5  gradient    1.5 MiB  op 3  w.grad
forward
  0  aten.mm.default              net.0  (%0) -> %1 1 MiB                         1.5 ms  workspace 2 KiB
  1  aten.native_dropout.default  net.1  (%1) -> %2 1 MiB can reuse %1, %3 1 KiB          random
loss
  2  loss                                (%2) -> %4 1 MiB                                 once
backward
  3  aten.mm.default              net.0  (%4 %0) -> %5 1.5 MiB, changes %0        3 ms
outputs %5
"""

    assert show_program(net()) == expected
    assert str(net()) == expected


def test_a_schedule_folds_frees_and_marks_repetition_reuse_and_copies():
    forward = (Run(0, (1,)), Run(1, (2,), ((2, 1),)), Start(2, 0), Wait(2, 0), Run(2, (4,)), Free(2))
    backward = (Run(0, (1,)), Free(1), Free(2, 1), Run(3, (5,), unit=1), Free(4))
    schedule = Schedule(net().digest, (*forward, *backward), (Placement(1, 0, 4096, 0, 2),))
    expected = """\
schedule for net: 11 instructions, 1 repeated runs
forward
  0   run    aten.mm.default              net.0  (%0) -> %1 1 MiB                          1.5 ms  workspace 2 KiB
  1   run    aten.native_dropout.default  net.1  (%1) -> %2 1 MiB in %1, %3 1 KiB dropped          random
  2   start  %2 1 MiB over link 0
  3   wait   %2 1 MiB over link 0
loss
  4   run    loss                                (%2) -> %4 1 MiB                                  once
  5   free   %2
  6   again  aten.mm.default              net.0  (%0) -> %1 1 MiB                          1.5 ms  workspace 2 KiB
  7   free   %1
  8   free   %2 in tier 1
backward
  9   run    aten.mm.default              net.0  (%4 %0) -> %5 1.5 MiB, changes %0         3 ms      on unit 1
  10  free   %4
placements
  %1  tier 0  at 4096  during [0, 2)
"""

    assert show_schedule(net(), schedule) == expected


def big(count: int) -> Program:
    """Many ops, and one that reads and changes what all of them read: an optimizer's step."""
    every = tuple(range(count))
    buffers = [Buffer(f"layers.{n}.weight", 512 * (n + 1), Kind.PARAMETER) for n in every]
    buffers += [Buffer(f"g{n}", 512, Kind.GRADIENT) for n in every]
    ops = [Op(f"op{n}", "aten.mm.default", "mm", Phase.BACKWARD, (n,), (count + n,), where=f"layers.{n}") for n in every]
    odd = tuple(n for n in range(count, 2 * count) if n % 2)
    ops.append(Op("step", "optimizer.adamw", "s", Phase.UPDATE, odd, (), mutates=every, repeatable=False))
    return Program("big", tuple(buffers), tuple(ops), ())


def test_one_wide_op_does_not_widen_every_row():
    """What it reads is all there, once; rows of consecutive buffers are ranges; and the text grows with the ops alone."""
    program = big(600)
    schedule = Schedule(program.digest, tuple(Run(n, program.ops[n].writes) for n in range(601)))
    for text in (show_program(program), show_schedule(program, schedule)):
        rows = text.splitlines()
        wide = next(row for row in rows if "optimizer.adamw" in row)
        assert all(f"%{n} " in wide.replace(")", " ") for n in range(601, 1200, 2))
        assert "changes %0...%599" in wide
        assert max(len(row) for row in rows if row is not wide) < 130
        assert len(text) - len(wide) < 600 * 160
