"""How fast the machine is against its best: readings with a clock of their own, and the file of the fastest."""

from pathlib import Path

import pytest
from memplan.planner.cost import gauge, watch
from memplan.planner.cost.gauge import KEPT, Reading, Reference, best_of, is_possible, read_pace, usual, worse
from memplan.planner.cost.watch import Watch

pytestmark = pytest.mark.cold

QUICK, SLOW = Reading(1, 1e-3, 2e-3), Reading(2, 2e-3, 2e-3)


def test_a_reading_has_both_times() -> None:
    found = read_pace("cpu")
    assert 0 < found.product < 60
    assert 0 < found.copy < 60
    assert found.when > 1.7e9


def scripted(monkeypatch: pytest.MonkeyPatch, runs: list[tuple[float, bool]]) -> None:
    """Let runs take these seconds, disturbed or not, the last for ever, by a clock that nothing else moves."""
    now, taken = [0.0], [0]

    class Scripted(Watch):
        @property
        def disturbed(self) -> bool:
            return runs[min(taken[0], len(runs)) - 1][1]

    def run(*_: object) -> float:
        took = runs[min(taken[0], len(runs) - 1)][0]
        taken[0] += 1
        now[0] += took
        return took

    monkeypatch.setattr(gauge.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gauge, "Watch", Scripted)
    monkeypatch.setattr(gauge, "timed", run)


def test_undisturbed_runs_count_and_a_single_odd_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [(9.0, True), (0.001, False), (0.009, True), (1e-9, False), (0.003, False), (0.002, False), (0.002, False)]
    scripted(monkeypatch, runs)
    assert usual(lambda: None, "cpu") == (0.002, False)


def test_a_reading_beside_other_work_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [(0.05, True), (0.04, True), (0.06, True)])
    assert usual(lambda: None, "cpu") == (0.04, True)


def test_slowness_is_against_the_best_of_either(tmp_path: Path) -> None:
    """The slower of the two works counts; what is not known says nothing."""
    reference = Reference("a device", tmp_path)
    assert reference.slowness(SLOW) == 1.0
    reference.add([QUICK, QUICK])
    assert reference.slowness(SLOW) == 2.0
    assert reference.slowness(Reading(3, 1e-3, 6e-3)) == 3.0
    assert reference.slowness(Reading(3)) == reference.slowness(None) == 1.0
    assert reference.doubts(SLOW)
    assert not reference.doubts(QUICK)
    assert reference.doubts(QUICK._replace(disturbed=True))
    assert not reference.doubts(None)


def test_a_single_impossible_reading_does_no_harm(tmp_path: Path) -> None:
    reference = Reference("a device", tmp_path)
    reference.add([QUICK, Reading(1, 1e-9, 1e-9), QUICK, Reading(1, -1.0, float("inf"))])
    assert reference.slowness(QUICK) == 1.0


def test_readings_beside_other_work_are_no_best(tmp_path: Path) -> None:
    reference = Reference("a device", tmp_path)
    reference.add([Reading(1, 1e-4, 1e-4, disturbed=True)] * 3 + [None])
    assert best_of(reference.fastest.product) == 0.0


def test_the_fastest_survive_the_disk_and_other_writers(tmp_path: Path) -> None:
    """A file holds a few, each once however often it is written; another device has its own; nonsense is empty."""
    first, second = Reference("a device", tmp_path), Reference("a device", tmp_path)
    first.add([SLOW, SLOW])
    second.add([QUICK])
    second.add([QUICK])
    assert Reference("a device", tmp_path).slowness(SLOW) == 2.0
    first.add([SLOW] * KEPT)
    assert Reference("a device", tmp_path).slowness(SLOW) == 2.0
    assert len(Reference("a device", tmp_path).fastest.product) <= KEPT
    assert Reference("another", tmp_path).slowness(SLOW) == 1.0
    first.path.write_text("{")
    assert Reference("a device", tmp_path).slowness(SLOW) == 1.0


def test_what_was_known_can_be_forgotten(tmp_path: Path) -> None:
    """For a machine that has become another one."""
    reference = Reference("a device", tmp_path)
    reference.add([QUICK, QUICK])
    reference.forget()
    reference.add([SLOW])
    assert Reference("a device", tmp_path).slowness(SLOW) == 1.0


def test_when_it_is_worth_timing_again(tmp_path: Path) -> None:
    reference = Reference("a device", tmp_path)
    reference.add([QUICK, QUICK])
    busy = QUICK._replace(disturbed=True)
    assert reference.is_better(QUICK, SLOW)
    assert not reference.is_better(SLOW, SLOW)
    assert not reference.is_better(SLOW, QUICK)
    assert not reference.is_better(busy, SLOW)
    assert not reference.is_better(busy, busy)
    assert reference.is_better(QUICK, busy)
    assert reference.is_better(SLOW, QUICK, disturbed=True)
    assert reference.is_better(QUICK, None, disturbed=True)
    assert not reference.is_better(QUICK, None)


def test_between_two_readings_the_slower_counts() -> None:
    assert worse(Reading(1, 1.0, 4.0), Reading(2, 2.0, 3.0, True)) == Reading(2, 2.0, 4.0, True)
    assert worse(None, QUICK) == worse(QUICK, None) == QUICK
    assert worse(None, None) is None


def test_no_machine_is_a_hundred_times_as_fast_as_itself() -> None:
    flops = 2 * gauge.ROWS["cpu"] ** 3
    assert is_possible(1e-3, flops, 0, QUICK, "cpu")
    assert is_possible(1e-4, flops, 0, QUICK, "cpu")
    assert not is_possible(1e-6, flops, 0, QUICK, "cpu")
    assert not is_possible(1e-6, 0.0, 2 * gauge.BYTES["cpu"], QUICK, "cpu")
    assert not is_possible(0.0, 0.0, 0, QUICK, "cpu")
    assert is_possible(1e-9, 1e15, 0, None, "cpu")


def test_what_a_hypervisor_took_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one takes anything: half of the time taken away is not our time."""
    took = iter([5.0, 5.5])
    monkeypatch.setattr(watch, "is_guest", lambda: True)
    monkeypatch.setattr(watch, "stolen", lambda: next(took))
    monkeypatch.setattr(watch, "waited", lambda: 0.0)
    with Watch() as seen:
        pass
    assert seen.stolen == 0.5
    assert seen.disturbed
