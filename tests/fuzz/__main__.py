"""Judge many random models, on all cores, and count what came out.

python tests/fuzz --cases 2000      prints a table, and every case that is silently different, damaged or crashed
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
AT_ONCE = 20  # cases of one process


def work(seeds: list[int], doors: list[str]) -> None:
    """Judge some seeds in this process; a line of JSON for each outcome."""
    import torch
    from judge import Case, eager_steps, judge_door, judge_plan

    torch.set_num_threads(1)
    judges = {"plan": judge_plan, "door": judge_door}
    for seed in seeds:
        case = Case(seed)
        steps = eager_steps(case)
        for door in doors:
            try:
                outcome = judges[door](case, steps)
            except BaseException as error:
                outcome = f"CRASHED: {type(error).__name__}: {str(error)[:200]}"
            print("@" + json.dumps([seed, door, case.name, outcome]), flush=True)


def in_a_process(seeds: list[int], doors: list[str]) -> list[tuple[int, str, str, str]]:
    """The same in a fresh process, which may die."""
    command = [sys.executable, __file__, "--work", "--doors", *doors, "--seeds", *map(str, seeds)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [tuple(json.loads(line[1:])) for line in done.stdout.splitlines() if line.startswith("@")]
    missing = [(seed, door) for seed in seeds for door in doors if (seed, door) not in {row[:2] for row in rows}]
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return rows + [(seed, door, str(seed), f"CRASHED: the process ended: {last}") for seed, door in missing[:1]]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, nargs="*", help="these seeds alone")
    parser.add_argument("--doors", nargs="+", choices=["plan", "door"], default=["plan"], help="door: torch.compile")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--all", action="store_true", help="print every case")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.seeds, asked.doors)
        return 0
    os.environ["MEMPLAN_CACHE"] = tempfile.mkdtemp()
    seeds = asked.seeds or list(range(asked.first, asked.first + asked.cases))
    parts = [seeds[at : at + AT_ONCE] for at in range(0, len(seeds), AT_ONCE)]
    began, counts, reasons, bad = time.monotonic(), Counter(), Counter(), 0
    with ThreadPoolExecutor(asked.processes) as pool:
        for rows in pool.map(lambda part: in_a_process(part, asked.doors), parts):
            for _, door, name, outcome in rows:
                kind = outcome.split(":")[0]
                counts[door, kind] += 1
                if kind in ("refused", "no case"):
                    reasons[re.sub(r"\d+", "N", outcome)[:160]] += 1
                bad += kind.isupper()
                if asked.all or kind.isupper():
                    print(f"{door:5} {name}\n      {outcome}", flush=True)
    print(f"\n{len(seeds)} seeds in {time.monotonic() - began:.0f} s")
    for (door, kind), count in sorted(counts.items()):
        print(f"{door:6} {kind:10} {count}")
    print("\nreasons:")
    for reason, count in reasons.most_common(60):
        print(f"{count:5}  {reason}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
