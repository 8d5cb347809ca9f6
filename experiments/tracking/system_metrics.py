"""Sample the driver's machine while networks train: CPU, memory, disk, network and GPUs, with MLflow's own monitors.

Sampling is on unless `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false`. The interval is
`MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL` seconds, by default 10. Samples hold only numbers, no name of a machine, user,
process or disk. Ray's dashboard shows the other nodes of a cluster.

MLflow's own sampling thread ends for good when the server once fails to answer. Ours keeps what is not logged yet.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from storage import fs

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

SPOOL = "system.jsonl"
INTERVAL_S = 10.0  # between samples

Sample = tuple[int, Mapping[str, float]]  # milliseconds since 1970, values by metric


def enabled() -> bool:
    """Whether to sample: `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING`, MLflow's own switch, which is on here by default."""
    return os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").strip().lower() not in ("false", "0")


class SystemSampler:
    """Takes samples and keeps them until they are logged.

    Samples that a driver could not log before its end are kept in `system.jsonl` in the run folder. The next driver
    logs them.
    """

    def __init__(self, run: str, on_sample: Callable[[], None]) -> None:
        self._spool, self._on_sample = fs.join(run, SPOOL), on_sample
        self._waiting: list[Sample] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken_up = False

    def start(self) -> None:
        """Begin to sample in a thread, unless sampling is off or has begun."""
        if enabled() and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
            self._thread.start()

    def flush(self, log: Callable[[list[Sample]], None]) -> None:
        """Log all samples that wait, also those of an earlier driver. If `log` raises, they continue to wait."""
        with self._lock:
            self._take_up()
            samples = list(self._waiting)
        if samples:
            log(samples)
            with self._lock:
                del self._waiting[: len(samples)]
            fs.remove(self._spool)

    def stop(self) -> None:
        """Stop sampling, and wait until the thread has ended."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def keep(self) -> None:
        """Write the samples that still wait to `system.jsonl`."""
        with self._lock:
            self._take_up()
            if self._waiting:
                fs.write_text(self._spool, "".join(json.dumps(sample) + "\n" for sample in self._waiting))

    def _take_up(self) -> None:
        if not self._taken_up and fs.exists(self._spool):
            kept = [json.loads(line) for line in fs.read_text(self._spool).splitlines()]
            self._waiting = [(int(at), numbers) for at, numbers in kept] + self._waiting
        self._taken_up = True

    def _run(self) -> None:
        from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

        monitors = _monitors()
        _numbers(monitors)  # the first CPU percentage has no interval to refer to, so it is dropped
        while not self._end.wait(float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL_S)):
            sample = int(time.time() * 1000), _numbers(monitors)
            with self._lock:
                self._waiting.append(sample)
            self._on_sample()


def _monitors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        with suppress(ImportError, RuntimeError):  # no such GPU here
            monitors.append(kind())
    return monitors


def _numbers(monitors: Sequence[BaseMetricsMonitor]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        numbers |= {f"system/{key}": float(value) for key, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return numbers
