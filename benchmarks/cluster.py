"""A local Ray for a benchmark."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def local(cpus: int) -> Iterator[None]:
    """A Ray of its own that books `cpus`, without a dashboard; ended afterwards."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()


def start_workers(count: int) -> None:
    """Have `count` workers running. Ray ends those that have had nothing to do for a second or so."""
    import ray

    task: Any = ray.remote(lambda seconds: time.sleep(seconds))
    ray.get([task.remote(1.0) for _ in range(count)])
