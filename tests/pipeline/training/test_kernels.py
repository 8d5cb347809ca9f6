from __future__ import annotations

import logging
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.kernels import Compiled, fastest_convolutions, lacks_bf16, same_bits_every_time
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import Batch, settle, train_step

SDNET = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)
UNET = UNetConfig(width=4)
ALL_TERMS = LossConfig(kl=0.1, balance=0.1, align=0.1, contrast=0.1)
CONFIG = TrainConfig(precision="fp32", ema=0.9)


def batch(labelled: int = 2, unlabelled: int = 2, seed: int = 0) -> Batch:
    g, n = torch.Generator().manual_seed(seed), labelled + unlabelled
    image = torch.rand(n, 1, 32, 32, generator=g) * 2 - 1
    return Batch(image, (image[:, 0] > 0).long(), torch.arange(n) < labelled, torch.arange(n), torch.arange(n) % 2)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """torch counts what it compiles of one function over all of its objects, and stops at eight."""
    torch.compiler.reset()


class Trained(NamedTuple):
    state: TrainState
    losses: list[dict[str, float]]
    gradients: list[torch.Tensor]  # of the first step


def trained(
    network: UNetConfig | SDNetConfig,
    batches: list[Batch],
    config: TrainConfig,
    backend: str | None,
    loss: LossConfig = ALL_TERMS,
) -> Trained:
    """What comes of a step of each of these batches; compiled whole, where a backend is named."""
    state = TrainState.create(network, config, seed=0, vendors=2)
    objective = Objective(state.model, loss, state.latent, state.alignment, state.average)
    compiled = None if backend is None else objective.compile_terms(backend)
    losses: list[dict[str, float]] = []
    gradients: list[torch.Tensor] = []
    for one in batches:
        losses.append({name: float(term) for name, term in train_step(objective, state, one, config).items()})
        gradients = gradients or [p.grad.clone() for p in state.model.parameters() if p.grad is not None]
    settle(state)
    assert compiled is None or compiled.works  # as one graph, and every shape
    return Trained(state, losses, gradients)


def assert_alike(ours: Trained, theirs: Trained) -> None:
    for found, expected in zip(ours.losses, theirs.losses, strict=True):
        assert found == pytest.approx(expected, abs=5e-3)
    torch.testing.assert_close(ours.gradients, theirs.gradients, rtol=1e-2, atol=1e-4)
    for name in ("model", "candidate"):  # what is kept has the names that it had
        assert getattr(ours.state, name).state_dict().keys() == getattr(theirs.state, name).state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("network", [UNET, SDNET])
def test_a_compiled_step_is_one_graph_and_that_of_the_plain_step(network: UNetConfig | SDNetConfig) -> None:
    batches = [batch(seed=k) for k in range(3)] + [batch(unlabelled=0, seed=4)]
    pair = [trained(network, batches, CONFIG, backend) for backend in (None, "aot_eager")]
    assert_alike(pair[1], pair[0])


@pytest.mark.slow
def test_twins_separate_updates_and_bf16_are_compiled_whole_too() -> None:
    config = CONFIG.model_copy(update={"update": "separate", "precision": "bf16", "gradient_clip": 1.0})
    trained(SDNET, [batch()], config, "aot_eager")
    twins = [replace(batch(seed=k), twin=batch(seed=k).image.flip(-1)) for k in range(2)]
    pair = [trained(UNET, twins, CONFIG, backend) for backend in (None, "aot_eager")]
    assert "consistency" in pair[1].losses[0]
    assert_alike(pair[1], pair[0])
    loss, averaged = ALL_TERMS.model_copy(update={"consistency_by": "teacher"}), CONFIG.model_copy(update={"ema": 0.9})
    pair = [trained(UNET, twins, averaged, backend, loss) for backend in (None, "aot_eager")]
    assert "consistency" in pair[1].losses[0]
    assert_alike(pair[1], pair[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("network", [UNET, SDNET])
def test_what_the_inductor_makes_of_a_step_is_the_plain_step(network: UNetConfig | SDNetConfig) -> None:
    batches = [batch(seed=k) for k in range(3)]
    pair = [trained(network, batches, CONFIG, backend) for backend in (None, "inductor")]
    assert_alike(pair[1], pair[0])


class Weighted(torch.nn.Module):
    """A weighted sum that counts its calls in a buffer, as batch-norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((), 2.0))
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))

    def terms(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"sum": (self.weight * image).sum()}


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("no backward pass\nor anything else")


def fails(graph: torch.fx.GraphModule, _: object) -> Any:
    raise RuntimeError("no compiler\nor anything else")


def fails_backward(graph: torch.fx.GraphModule, _: object) -> Any:
    def call(*arguments: Any) -> Any:
        return tuple(NoGradient.apply(out) if out.requires_grad else out for out in graph(*arguments))

    return call


@pytest.mark.parametrize(("backend", "why"), [(fails, "no compiler"), (fails_backward, "no backward pass")])
def test_what_cannot_be_compiled_is_called_as_it_is_and_says_so_once(
    backend: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Weighted()
    compiled = Compiled(module, module.terms, backend)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            compiled(torch.ones(3))["sum"].backward()
    assert not compiled.works
    assert float(module.weight.grad) == 6.0 and float(module.calls) == 2.0  # type: ignore[arg-type]
    lines = [record.getMessage() for record in caplog.records if record.name == "pipeline.training.kernels"]
    assert lines == [f"torch.compile failed, steps are taken without it: {why}"]


def test_what_is_tried_for_new_shapes_leaves_no_trace_and_is_not_compiled_again() -> None:
    module, graphs = Weighted(), []

    def kept(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = Compiled(module, module.terms, kept)
    for k, size in enumerate((3, 4, 3), start=1):
        found = compiled(torch.ones(size))["sum"]
        assert float(found.detach()) == 2.0 * size and float(module.calls) == k
    assert compiled.works and module.weight.grad is None and len(graphs) == 2


def test_convolutions_are_tried_on_a_gpu_alone_and_never_where_bits_must_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(cudnn, name, False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    seen = []
    try:
        for _ in range(2):
            for device in ("cpu", "cuda"):
                with fastest_convolutions(torch.device(device)):
                    seen.append(cudnn.benchmark)
                assert not cudnn.benchmark
            same_bits_every_time()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True, False, False]


@pytest.mark.parametrize(
    ("capabilities", "lacks"),
    [
        pytest.param(
            {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True, id="Ice Lake"
        ),
        pytest.param(
            {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, False, id="Zen 4"
        ),
        pytest.param({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False, id="AMX alone"),
        pytest.param({"architecture": "x86_64", "avx2": True}, True, id="AVX2"),
        pytest.param({"architecture": "aarch64", "neon": True, "bf16": False}, True, id="Apple M1"),
        pytest.param({"architecture": "aarch64", "neon": True, "bf16": True}, False, id="Graviton 3"),
        pytest.param({}, False, id="a torch that cannot tell"),
    ],
)
def test_a_processor_lacks_bf16_without_any_of_its_instructions(capabilities: dict[str, Any], lacks: bool) -> None:
    assert lacks_bf16(capabilities) is lacks


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="x86's flags as Linux shows them"
)
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not tell what a processor has")
def test_this_processor_lacks_bf16_if_linux_shows_no_flag_of_it() -> None:
    flags = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")).split()
    assert lacks_bf16() is {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
