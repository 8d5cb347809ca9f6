"""Fixtures that several tests share."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

if find_spec("hypothesis"):  # the tests for a GPU need it not
    from hypothesis import settings

    # No time is asserted in a test: Hypothesis is not to fail one because the machine was busy.
    # Few examples in `make test`; `make test-slow` runs the same properties with `--hypothesis-profile=thorough`.
    settings.register_profile("thorough", deadline=None)
    settings.register_profile("quick", deadline=None, max_examples=25)
    settings.load_profile("quick")

REALDATA = Path(__file__).resolve().parents[2] / "shared" / "realdata"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, files without such a test are not even imported: a machine with a GPU may lack what they need."""
    only_gpu = config.getoption("markexpr", "") == "gpu" and collection_path.suffix == ".py"
    if only_gpu and "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8"):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that no process works on it alone at the end (with `--no-loadscope-reorder`)."""
    items.sort(key=lambda item: item.path.name != "test_ablation.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Processes share the tests by file, so that a module's fixtures are made once; all files that use the one
    local Ray go to the same process. (xdist's own groups do nothing under pytest 9.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if "ray_local" in (config.rootpath / file).read_text(encoding="utf-8") else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray on loopback that books four CPUs, whatever the machine has; started once, ended with the session."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=256 * 1024**2,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    yield
    if started:
        ray.shutdown()


@pytest.fixture
def no_room(ray_local: None) -> Iterator[None]:
    """All CPUs of the local Ray are booked by somebody else."""
    from ray.util.placement_group import placement_group, remove_placement_group

    booked = placement_group([{"CPU": 4}])
    assert booked.wait(120)
    yield
    remove_placement_group(booked)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of a real S3 server on loopback, with a bucket `bucket`; it serves `s3://` in this process till the end."""
    import fsspec.config

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
                break
            except OSError:  # not up yet
                assert server.poll() is None, "moto.server ended at once"
                time.sleep(0.1)
        else:
            raise TimeoutError("moto.server does not answer")
        fsspec.config.conf["s3"] = {"endpoint_url": endpoint, "key": "test", "secret": "test"}
        yield endpoint
    finally:
        fsspec.config.conf.pop("s3", None)
        server.terminate()
        server.wait()


class S3Proxy(ThreadingHTTPServer):
    """A server in front of the S3 server: notes every request, and lets those fail that `fault` (number, method) names.

    A fault is a status, "no answer" (the S3 server did as it was asked; the client is not told) or "half an answer".
    Its clock is `clock_s` seconds ahead of this machine's. Conditional writes are let through one at a time, since
    moto's server checks and writes in two steps; with `ignores_conditions` they become plain ones, and with
    `knows_no_conditions` they are refused as not implemented.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.behind, self.url = urlsplit(endpoint).netloc, f"http://127.0.0.1:{self.server_port}"
        self.numbers = count(1)
        self.conditional = threading.Lock()
        self.mend()

    def mend(self) -> None:
        """From now on nothing fails, and no request is noted yet."""
        self.fault: Callable[[int, str], str | None] = lambda number, method: None
        self.clock_s, self.ignores_conditions, self.knows_no_conditions = 0, False, False
        self.requests: list[tuple[str, str]] = []


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # for `Expect: 100-continue`, with which uploads begin
    server: S3Proxy

    def _pass(self) -> None:
        self.close_connection = True
        self.server.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(next(self.server.numbers), self.command)
        if fault is not None and fault.isdecimal():
            self._answer(int(fault), http.client.responses[int(fault)], [], b"", 0)
            return
        headers = dict(self.headers)
        conditions = [name for name in headers if name.lower() in ("if-match", "if-none-match")]
        if self.server.knows_no_conditions and conditions:
            self._answer(501, "Not Implemented", [], b"", 0)
            return
        if self.server.ignores_conditions:
            headers = {name: value for name, value in headers.items() if name not in conditions}
        behind = http.client.HTTPConnection(self.server.behind)
        with self.server.conditional if conditions else nullcontext():
            behind.request(self.command, self.path, body, headers)
            answer = behind.getresponse()
            data = answer.read()
        behind.close()
        if fault == "no answer":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        length = int(answer.getheader("Content-Length") or len(data))  # of HEAD: of what GET would give
        sent = data[: len(data) // 2] if fault == "half an answer" else data
        self._answer(answer.status, answer.reason, answer.getheaders(), sent, length)

    def _answer(self, status: int, reason: str, headers: Sequence[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() in ("date", "last-modified") and self.server.clock_s:
                told = parsedate_to_datetime(value) + timedelta(seconds=self.server.clock_s)
                self.send_header(name, format_datetime(told, usegmt=True))
            elif name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _pass


@pytest.fixture(scope="session")
def s3_proxy(s3_endpoint: str) -> Iterator[S3Proxy]:
    """A way to the S3 server on which requests can be made to fail; its URL is `url`."""
    with S3Proxy(s3_endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def s3_impatient(s3_proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """fsspec's settings for `s3://` in this process during a test: by way of the proxy, and no second try."""
    import fsspec.config
    import s3fs

    options: dict[str, Any] = {"endpoint_url": s3_proxy.url, "key": "me", "secret": "hidden"}
    options["config_kwargs"] = {"retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3_proxy.mend()
    yield options
    s3_proxy.mend()


@pytest.fixture(scope="session")
def real_acdc() -> Path:
    """The real ACDC training folder; the test is skipped where it is absent."""
    folder = REALDATA / "acdc" / "training"
    if not folder.is_dir():
        pytest.skip("no real ACDC data beside the project")
    return folder


@pytest.fixture(scope="session")
def real_sunnybrook() -> Path:
    """The real Sunnybrook table folder; the test is skipped where it is absent."""
    folder = REALDATA / "sunnybrook_ge"
    if not folder.is_dir():
        pytest.skip("no real Sunnybrook data beside the project")
    return folder


@pytest.fixture(scope="session")
def real_dicom() -> Path:
    """The folder of the real Sunnybrook DICOM studies; the test is skipped where it is absent."""
    folder = REALDATA / "sunnybrook_dicom"
    if not folder.is_dir():
        pytest.skip("no real DICOM studies beside the project")
    return folder


@pytest.fixture
def write_nifti() -> Callable[..., Path]:
    """A function that writes data in file order (x, y, z[, t]) with the given voxel size (x, y, z), by nibabel."""

    def write(path: Path, data_xyz: npt.NDArray[Any], zooms: tuple[float, ...] = (1.5, 1.5, 8.0)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(data_xyz, np.diag([*zooms[:3], 1.0]))
        nib.save(image, path)
        return path

    return write


@pytest.fixture
def study() -> Callable[..., tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]]:
    """A function that makes a cine (x, y, z, t) int16 and its mask, labelled at the frames given: a ring in noise."""

    def make(
        seed: int, labelled: Sequence[int] = (0, 2), shape: tuple[int, int, int, int] = (24, 20, 3, 4)
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 900, shape).astype(np.int16)
        mask = np.zeros(shape, np.uint8)
        for frame in labelled:
            mask[6:16, 6:16, :, frame] = 2
            mask[8:14, 8:14, :, frame] = 1
            mask[2:6, 6:14, :, frame] = 3
        return image, mask

    return make


@pytest.fixture
def mnms_folder(
    tmp_path: Path, write_nifti: Callable[..., Path], study: Callable[..., Any]
) -> Callable[[dict[str, tuple[str, str]]], Path]:
    """A function that writes a M&Ms folder of {code: (part, vendor)}; ED 0, ES 2, unlabelled ones as in the release."""

    def build(subjects: dict[str, tuple[str, str]]) -> Path:
        lines = [",External code,VendorName,Vendor,Centre,ED,ES,Age,Pathology,Sex,Height,Weight"]
        for seed, (code, (part, vendor)) in enumerate(subjects.items()):
            image, mask = study(seed)
            folder = tmp_path / "mnms" / "OpenDataset" / part / code
            write_nifti(folder / f"{code}_sa.nii.gz", image)
            write_nifti(folder / f"{code}_sa_gt.nii.gz", mask)
            phases = "0,0" if part.endswith("Unlabeled") else "0,2"
            lines.append(f"{seed},{code},some,{vendor},1,{phases},50,NOR,F,170,70")
        table = tmp_path / "mnms" / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
        table.write_text("\n".join(lines) + "\n")
        return tmp_path / "mnms"

    return build
