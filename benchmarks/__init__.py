"""Speed and memory of fastret's ops against the matmuls they need and against what others do: ``python -m benchmarks``.

Every speed is the median of interleaved runs, beside a floor timed in the same run; every peak is that of a process of
its own; a variant that disagrees with the float64 definition gets no figure. History: ``benchmarks/history.csv``.
"""

import os

# Read by libgomp when torch is first imported, which this package does below: torch's threads would otherwise spin
# while they wait, and on a shared machine that slows every variant by a factor that has nothing to do with it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
