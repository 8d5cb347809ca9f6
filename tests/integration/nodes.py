"""A real local cluster of several raylets, whose nodes may be lost and replaced."""

from __future__ import annotations

import os
import signal


class Nodes:
    """A head with `cpus` CPUs, and others with as many each."""

    def __init__(self, others: int = 1, cpus: float = 1, dashboard: bool = False) -> None:
        from ray.cluster_utils import Cluster

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # a lost node is noticed within seconds
        noticing = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500}
        self._node = {"num_cpus": cpus, "object_store_memory": 100 * 1024**2}
        head = self._node | {"include_dashboard": dashboard, "_system_config": noticing}
        if dashboard:
            head["dashboard_port"] = 0
        self._cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        self.address = self._cluster.address
        self._others = [self._cluster.add_node(**self._node) for _ in range(others)]

    @property
    def dashboard(self) -> str:
        """URL of the dashboard and job server."""
        return f"http://{self._cluster.head_node.webui_url}"

    def lose_one(self) -> None:
        """SIGKILL the raylet of a node that is not the head, and add a node in its place."""
        lost = self._others.pop(0)
        os.kill(lost.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        self._cluster.remove_node(lost, allow_graceful=False)
        self._others.append(self._cluster.add_node(**self._node))

    def end(self) -> None:
        """End all of its processes."""
        self._cluster.shutdown()
