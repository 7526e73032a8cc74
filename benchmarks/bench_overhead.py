"""Host cost of a call: every op on inputs so small that a call is nearly all overhead, beside torch's nearest call.

python benchmarks/bench_overhead.py              every case of this machine's device, results stored
python benchmarks/bench_overhead.py --list       the cases
python benchmarks/bench_overhead.py --calls      Python functions that each case enters, the same on any machine
On a CPU the time of a call on one thread is nearly all overhead. On a GPU the figures are host_ms, the host's time to
launch a call, and launches, the kernels of a call; the table shows both beside SDPA's and FlexAttention's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cases.overhead import BUDGET, cases_for
from measure import command, counts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help. It runs on one thread, because starting others would be measured too."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--calls"]:
        cpu = torch.device("cpu")
        for case in cases_for(cpu):
            print(f"{counts.python_calls(case.open(cpu).step('fastattn')):6} {case.name}")
        return 0
    argv += ["--threads", "1"]
    return command.main("overhead", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
