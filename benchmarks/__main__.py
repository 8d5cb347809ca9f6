"""`python -m benchmarks NAME` prints, last, one line of JSON: name, ratio, ours, reference, unit."""

from __future__ import annotations

import importlib
import json
import os
import sys

# Both sides get the same threads: one, set before numpy and torch are loaded.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

NAMES = (
    "actors",
    "bank-read",
    "bank-size",
    "extract",
    "far-store",
    "gpu",
    "gpu-stages",
    "ingest",
    "makers",
    "memory",
    "node-cache",
    "overhead",
    "paper-size",
    "predict",
    "rescale",
    "scale",
    "slice-read",
    "stream",
    "synthesize",
    "train-step",
)


def main() -> int:
    """Run one benchmark, or all of them; exit status 2 for an unknown name."""
    names = sys.argv[1:] or ["--help"]
    if names == ["all"]:
        names = list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"usage: python -m benchmarks all|{'|'.join(NAMES)}", file=sys.stderr)
        return 2
    for name in names:
        result = importlib.import_module(f"benchmarks.{name.replace('-', '_')}").run()
        print(json.dumps({"name": name, **result}))
    return 0


sys.exit(main())
