from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler as Handler
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.resources import Cluster, Node, ResourceConfig, plan
from storage.errors import InputError

NODES = st.builds(
    Node, st.sampled_from((0, 0.3, 0.5, 1, 1.5, 2, 3, 4, 8, 64, 192)), st.sampled_from((0, 0, 0.5, 1, 4, 8))
)
CLUSTERS = st.builds(Cluster, st.lists(NODES, max_size=6).map(tuple))
SOME = st.one_of(st.none(), st.integers(1, 12))
CONFIGS = st.builds(
    ResourceConfig,
    lanes=SOME,
    train_workers=st.integers(1, 4),
    data_actors=SOME,
    extract_actors=SOME,
    gpus=st.sampled_from((None, None, True, False)),
    synthesis=st.sampled_from(("actors", "actors", "trainer")),
) | st.builds(ResourceConfig, lanes=SOME, data_actors=SOME, data_gpus=st.sampled_from((0.02, 0.05, 0.3)))


def one(cpus: float, gpus: float = 0.0) -> Cluster:
    return Cluster((Node(cpus, gpus),))


def placed(count: int, cpus: float, gpus: float, nodes: tuple[Node, ...]) -> bool:
    """Whether so many equal actors fit, each on one node."""
    places = [min(n.cpus / cpus + 1e-6, n.gpus / gpus + 1e-6 if gpus else count) for n in nodes]
    return sum(map(int, places)) >= count


@given(CONFIGS, CLUSTERS, st.integers(1, 12))
@example(ResourceConfig(), Cluster(()), 1)
@example(ResourceConfig(), one(0.5), 5)
@example(ResourceConfig(data_actors=12), one(0.5), 1)
@example(ResourceConfig(train_workers=2), Cluster((Node(1, 1), Node(0, 1))), 2)
def test_no_node_is_ever_overbooked_and_what_has_no_place_is_refused(
    config: ResourceConfig, cluster: Cluster, jobs: int
) -> None:
    try:
        budget = plan(config, cluster, jobs)
    except InputError as error:
        assert error.where.startswith("resources") and "\n" not in str(error)
        return
    trainers = budget.lanes * budget.train_workers
    assert budget.lanes <= jobs and budget.threads >= 1
    assert (budget.data_actors >= 1) == (config.synthesis == "actors")
    assert tuple(share.node for share in budget.shares) == cluster.nodes
    assert sum(share.trainers for share in budget.shares) == trainers
    assert sum(share.data_actors for share in budget.shares) == trainers * budget.data_actors
    for share in budget.shares:
        booked = share.trainers * budget.trainer_cpus + share.data_actors * budget.data_cpus
        assert booked <= share.node.cpus + 1e-6
        cards = share.trainers * budget.trainer_gpus + share.data_actors * budget.data_gpus
        assert cards <= share.node.gpus + 1e-6
    assert placed(budget.extract_actors, budget.extract_cpus, budget.extract_gpus, cluster.nodes)
    assert config.lanes is None or budget.lanes == min(config.lanes, jobs)
    assert config.extract_actors in (None, budget.extract_actors)
    assert config.synthesis == "trainer" or config.data_actors in (None, budget.data_actors)


@given(CONFIGS, CLUSTERS, st.integers(1, 12))
def test_what_ray_books_is_whole_above_one_cpu(config: ResourceConfig, cluster: Cluster, jobs: int) -> None:
    try:
        budget = plan(config, cluster, jobs)
    except InputError:
        return
    for cpus in (budget.trainer_cpus, budget.extract_cpus, *[budget.data_cpus] * (budget.data_actors > 0)):
        assert cpus > 0 and (cpus < 1 or cpus == int(cpus))


def test_two_cores_train_two_arms_of_one_thread_or_one_of_two() -> None:
    many, alone = (plan(ResourceConfig(), one(2), jobs) for jobs in (5, 1))
    assert (many.lanes, many.threads, many.data_actors) == (2, 1, 1)
    assert (alone.lanes, alone.threads, alone.data_actors) == (1, 2, 1)


@pytest.mark.parametrize("other", [{"deterministic": True}, {"train_workers": 2}])
def test_steps_are_not_compiled_where_bits_must_stay_or_workers_share_them(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"compile=true.*leave it out"):
        ResourceConfig(compile=True, **other)
    budget = plan(ResourceConfig(**other), one(8, 2))
    assert budget.compile is None and budget.deterministic == other.get("deterministic", False)


def test_a_trainer_never_books_more_than_one_node_has() -> None:
    budget = plan(ResourceConfig(), Cluster((Node(8),) * 6), 1)
    assert budget.trainer_cpus <= 8
    assert budget.threads <= 8


def test_cpu_nodes_train_an_arm_each() -> None:
    budget = plan(ResourceConfig(), Cluster((Node(8),) * 6), 5)
    assert budget.lanes == 5
    assert [share.trainers for share in budget.shares] == [1, 1, 1, 1, 1, 0]


def test_each_gpu_has_several_data_actors_where_there_are_cpus_and_one_where_there_are_few() -> None:
    def actors(*nodes: Node) -> int:
        return plan(ResourceConfig(), Cluster(nodes), 8).data_actors

    assert actors(Node(8, 1)) == 5
    assert actors(Node(4, 0), *(Node(8, 1),) * 4, *(Node(16),) * 5) == 8
    assert actors(Node(4, 4)) >= 1
    assert actors(Node(2, 4)) >= 1


def test_trainers_that_make_their_own_samples_leave_no_cpu_to_data_actors() -> None:
    cluster = Cluster((Node(4, 2), Node(16)))
    alone, beside = (plan(ResourceConfig(synthesis=s), cluster, 2) for s in ("trainer", "actors"))  # type: ignore[arg-type]
    assert (alone.data_actors, alone.data_cpus) == (0, 0.0)
    assert alone.trainer_cpus == 1.0 == beside.trainer_cpus  # half of the cores beside each card
    assert plan(ResourceConfig(synthesis="trainer"), one(16, 1)).trainer_cpus == 2.0  # a thread more
    assert alone.describe().splitlines() == [
        "2 arms at a time, each 1 train worker (GPU) without data actors; 2 extraction actors",
        "  1 × 4 CPUs and 2 GPUs: 2 trainers of 1 CPUs",
        "  1 × 16 CPUs: 0 trainers of 1 CPUs",
    ]
    assert plan(ResourceConfig(synthesis="trainer"), Cluster((Node(0.5, 1),))).lanes == 1


def test_data_actors_with_a_share_of_a_card_leave_the_rest_of_it_to_the_training() -> None:
    cluster = Cluster((Node(8, 1),))
    budget = plan(ResourceConfig(data_actors=3, data_gpus=0.1), cluster)
    beside = plan(ResourceConfig(data_actors=3, data_gpus=0.1), Cluster((Node(16), Node(8, 2))), 2)
    assert [share.data_actors for share in beside.shares] == [0, 6]
    assert (budget.trainer_gpus, budget.data_gpus, budget.extract_gpus) == (0.7, 0.1, 1.0)
    assert plan(ResourceConfig(data_actors=3, data_gpus=0.1), Cluster((Node(8),))).data_gpus == 0.0  # no GPU is there
    with pytest.raises(InputError, match=r"4 data actors with 0\.25 of a GPU each leave 0 of it to the training"):
        plan(ResourceConfig(data_actors=4, data_gpus=0.25), cluster)
    with pytest.raises(ValueError, match="data_gpus is for data actors on GPUs"):
        ResourceConfig(data_gpus=0.1, synthesis="trainer")


def test_gpus_without_cpus_beside_them_are_left_to_others() -> None:
    budget = plan(ResourceConfig(), Cluster((Node(8, 1), Node(0, 4))), 8)
    assert budget.lanes == 1
    assert [share.trainers for share in budget.shares] == [1, 0]


def test_the_plan_is_told_by_kinds_of_nodes() -> None:
    said = plan(ResourceConfig(), Cluster((Node(4), *(Node(8, 1),) * 2, Node(16))), 5).describe().splitlines()
    assert said[0].startswith("2 arms at a time, each 1 train worker (GPU) with 8 data actors")
    assert said[1:] == [
        "  1 × 4 CPUs: 0 trainers of 1 CPUs, 4 data actors of 1",
        "  2 × 8 CPUs and 1 GPU: 1 trainers of 1 CPUs, 0 data actors of 1",
        "  1 × 16 CPUs: 0 trainers of 1 CPUs, 12 data actors of 1",
    ]


@pytest.mark.parametrize(
    ("config", "cluster", "told"),
    [
        (ResourceConfig(gpus=True, train_workers=4), one(8, 1), "4 GPUs asked for, 1 in the cluster"),
        (ResourceConfig(train_workers=8, lanes=1), one(2), "need 4 CPUs, 2 in the cluster .*places for 4, 4 too few"),
        # four CPUs in all, and no node with a place for a trainer
        (ResourceConfig(), Cluster((Node(0.4),) * 10), "need 0.5 CPUs, 4 in the cluster .*places for 0, 1 too few"),
        (ResourceConfig(lanes=3), one(32, 2), "wants a GPU and .*places for 2, 1 too few"),
        (ResourceConfig(data_actors=40, lanes=1), one(1), "40 data actors each need 40 places .*too few"),
        (ResourceConfig(extract_actors=3), one(32, 2), "3 extraction actors want a GPU each, .*places for 2"),
        (ResourceConfig(), Cluster(()), r"0 in the cluster \(no nodes\)"),
    ],
)
def test_what_does_not_fit_is_refused_at_once_with_the_shortfall(
    config: ResourceConfig, cluster: Cluster, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        plan(config, cluster, 5)


LISTENING = """
import json, psutil, subprocess, sys
from actors.ray_start import start_ray
start_ray(1)
import ray
me = psutil.Process()
ours = {me.pid, *(child.pid for child in me.children(recursive=True))}
found = [c.laddr.ip for c in psutil.net_connections("tcp") if c.pid in ours and c.status == psutil.CONN_LISTEN]
code = "from actors.ray_start import start_ray; start_ray(1); import ray; print(ray.nodes()[0]['NodeID'])"
other = subprocess.check_output([sys.executable, "-c", code], text=True)
print(json.dumps([found, ray.nodes()[0]["NodeID"], other.strip()]))
"""


@pytest.mark.slow
def test_a_local_ray_listens_on_loopback_alone_and_is_ones_own() -> None:
    """Ray notes the cluster that was started last on a machine, and would join it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    listening, first, second = json.loads(done.stdout.splitlines()[-1])
    addresses = [ipaddress.ip_address(ip.removeprefix("::ffff:")) for ip in listening]
    assert len(addresses) >= 4  # GCS, raylet, agents
    assert [str(address) for address in addresses if not address.is_loopback] == []
    assert first != second


# Other tests may run a Ray on this machine at the same time, which `auto` would find.
JOIN = """
import functools
from ray._private import services
services.find_gcs_addresses = functools.cache(set)
from actors.ray_start import start_ray
start_ray()
"""


def told_of(address: str, **environment: str) -> str:
    """The last line on standard error of what joins the cluster at this address."""
    command = [sys.executable, "-c", JOIN]
    joined = os.environ | environment | {"RAY_ADDRESS": address}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=joined).stderr.splitlines()[-1]


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_an_address_where_nothing_answers_is_one_line_within_seconds(address: str) -> None:
    assert f"InputError: RAY_ADDRESS={address}: no Ray cluster answers there (" in told_of(address)


def test_a_cluster_that_is_gone_and_a_listener_that_is_no_ray_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:9")  # of a Ray that was killed
    gone = told_of("auto", RAY_TMPDIR=str(tmp_path))
    assert "InputError: RAY_ADDRESS=auto: no Ray cluster answers there (" in gone
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        for port, why in ((silent.getsockname()[1], "timed out"), (web.server_port, "what listens there is no Ray")):
            told = told_of(f"127.0.0.1:{port}")
            assert f"RAY_ADDRESS=127.0.0.1:{port}: no Ray cluster answers there ({why})" in told
        web.shutdown()
