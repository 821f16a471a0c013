#!/usr/bin/env python3
"""Counts the instructions of each piece of work in counted.rs and holds them against instructions.json.

    benches/instructions.py           fails where one takes over 10 % more than is recorded
    benches/instructions.py --record  records what was counted

valgrind counts, on a processor that it emulates (with AVX2, never AVX-512): the same program gives the same
numbers on every machine, whatever else it is doing. Another compiler may give others; record them then.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
CARGO = ["cargo", "run", "--quiet", "--features", "burn-cpu", "--example", "counted", "--"]
VALGRIND = "valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect=counted_work"
TOLERANCE = 0.10


def run(arguments, runner=None):
    env = dict(os.environ)
    if runner:
        env["CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER"] = runner
    done = subprocess.run(CARGO + arguments, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done


def count(name):
    said = run([name], VALGRIND).stderr
    found = re.search(r"Collected : (\d+)", said)
    return int(found.group(1)) if found else sys.exit(said)


def main():
    counts = {name: count(name) for name in run([]).stdout.split()}
    if sys.argv[1:] == ["--record"]:
        RECORD.write_text(json.dumps(counts, indent=4) + "\n")
        return
    recorded = json.loads(RECORD.read_text())
    is_worse = False
    for name, found in counts.items():
        if name not in recorded:
            sys.exit(f"{name} is not in {RECORD.name}: --record it")
        change = found / recorded[name] - 1
        is_worse |= change > TOLERANCE
        print(f"{name}: {found:,} instructions, {change:+.1%}")
    if is_worse:
        sys.exit(f"more than {TOLERANCE:.0%} above {RECORD.name}: make it cheaper, or --record and say why")


if __name__ == "__main__":
    main()
