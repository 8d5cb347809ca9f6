"""What each stage books on a machine with a GPU: on a cluster that was joined, and on a Ray of one's own.

No card is needed: a raylet that is told of one hands it out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Each stage's own way to start its processes, with a body that says what its process may use.
STAGES = """
import functools, json, os, types
import ray
if "RAY_ADDRESS" not in os.environ:
    ray.init = functools.partial(ray.init, num_gpus=1)  # as Ray finds it where there is a card
import ray.train.torch
from actors import export_samples, extraction, ingest, predict_studies, stages, streaming, train_worker, trainer
from actors.extraction import ExtractionActors
from actors.pool import Pool
from actors.ray_start import start_ray
from actors.resources import ResourceConfig, plan
from actors.waiting import PATIENCE
from storage.errors import StageError
cluster = start_ray()
budget = plan(ResourceConfig(), cluster, 1)
some = types.SimpleNamespace
def booked(*_):
    return [ray.get_runtime_context().get_accelerator_ids()["GPU"], os.environ.get("CUDA_VISIBLE_DEVICES")]
class Booked:
    def __init__(self, *_): pass
    __call__ = extract = write = segment = lambda self, _: booked()
    encoded = lambda self: {}
class Exporting(Booked):
    def write(self, unit):
        raise StageError(json.dumps(booked()))
def raised(work):
    try:
        return work()
    except Exception as error:
        return told(str(error))
def told(text):
    return json.loads(text[text.index("[[") : text.rindex("]") + 1])
def body(*_):
    raise RuntimeError(json.dumps(booked()))
found = {"task": ray.get(ray.remote(num_cpus=0)(booked).remote())}
stages.evaluate_job = lambda *_: json.dumps(booked())
stages.int = str  # of which `evaluate` otherwise makes a number of volumes
job = some(stream=some(run=""), out="", train=some(precision="fp32"), say_waiting=print, finished=lambda: False)
job.model_dump, job.name = dict, "arm"
run = some(arm="arm", seed=0, label="arm/seed0", job=job, evaluated=lambda: False)
found["score"] = json.loads(stages.evaluate([run], budget)["arm/seed0"])
stages._cost, stages.fs = (lambda run: 0), some(write_text=print, remove=print, join=os.path.join)
found["lane"] = told(stages.run_arms([run], budget, lambda _: None, body=body)["arm/seed0"])
stages.run_job = body
trainer._require_cuda = lambda: None  # torch may be a build without CUDA here
torch_trainer, gloo = ray.train.torch.TorchTrainer, ray.train.torch.TorchConfig("gloo")  # NCCL needs a card
ray.train.torch.TorchTrainer = functools.partial(torch_trainer, torch_config=gloo)
train_worker.train_loop, trainer.fs = body, stages.fs
found["train"] = raised(lambda: trainer.run_job(job, budget))
ingest._read = booked
with ingest._readers("", 1.0, PATIENCE) as pool:
    found["ingest"] = next(iter(pool.run([0])))[1]
found["pretrain"] = raised(lambda: stages.pretrain(job, budget, lambda _: None))
actors = ExtractionActors(1, budget.extract_cpus, budget.extract_gpus)
with extraction.extractors(some(helpers=1), some(), actors, Booked) as pool:
    found["extract"] = next(iter(pool.run([0])))[1]
for name, share in (("make", None), ("make on the card", 0.1)):
    there = plan(ResourceConfig(data_actors=1, data_gpus=share), cluster, 1) if share else budget
    with Pool(streaming._crew(None, 0, 1, 1, there.data_cpus, there.data_gpus, Booked), PATIENCE) as pool:
        found[name] = next(iter(pool.run([{"step": [0]}])))[1]
predict_studies._Segmenter = Booked
found["predict"] = next(iter(predict_studies.predict_studies(cluster, [], [], None, [some(name="study")], 1)))
export_samples._Exporter = Exporting
unit = some(name="unit", samples=())
found["export"] = raised(lambda: export_samples._run((None, "", "nnunet"), [unit], 1, 0.25, None, PATIENCE))
print(json.dumps(found))
"""
CARD, NONE = [["0"], "0"], [[], ""]
EXPECTED = {
    "task": NONE,
    "score": CARD,
    "lane": NONE,
    "pretrain": NONE,
    "train": CARD,
    "ingest": NONE,
    "extract": CARD,
    "make": NONE,
    "make on the card": CARD,
    "predict": CARD,
    "export": NONE,
}


# Torch has CUDA on no node, and on every node but the driver's.
BUILDS = """
import json
import ray
from actors import trainer
from actors.ray_start import start_ray
from storage.errors import InputError
start_ray()
here = ray.get_runtime_context().get_node_id()
trainer._require_cuda(lambda: ray.get_runtime_context().get_node_id() != here)
try:
    trainer._require_cuda(lambda: False)
except InputError as error:
    print(json.dumps(str(error)))
"""


def found(environment: dict[str, str], script: str = STAGES) -> Any:
    # with the token that a Ray of this process may have made the cluster ask for
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=kept | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_on_a_cluster_that_was_joined_each_stage_books_the_gpu_that_it_uses_and_the_others_see_none() -> None:
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 1, "include_dashboard": False})
    try:
        assert found({"RAY_ADDRESS": nodes.address}) == EXPECTED
    finally:
        nodes.shutdown()


@pytest.mark.slow
def test_on_a_ray_of_ones_own_each_stage_books_the_gpu_that_it_uses_and_the_others_see_none() -> None:
    assert found({}) == EXPECTED


@pytest.mark.slow
def test_a_driver_whose_torch_has_no_cuda_trains_on_nodes_whose_torch_has() -> None:
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1, num_gpus=1)
        told = found({"RAY_ADDRESS": nodes.address}, BUILDS)
        assert told.startswith("torch: is a build without CUDA, and the cluster has GPUs; ")
    finally:
        nodes.shutdown()
