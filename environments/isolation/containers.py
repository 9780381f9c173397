"""Workers in Podman containers: their images, built once, and the hardened containers that run them."""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import typing

from ldm_jax.environment import LibraryMissingError

from . import leftovers, venvs
from .caches import cache_folder
from .program import QUIET, SERVER, WorkerFaultError

PYTHON = "/venv/bin/python"
"""The interpreter inside an image."""
_PROGRAM = "/ldm_jax_worker"  # the folder of the worker's program, inside
PIDS_LIMIT = 256
CPUS = 2
HARD_MEMORY_MARGIN_BYTES = 256 << 20
"""What a container may hold beyond the limit at which its worker gives itself up, so that this can be told."""

_IMAGES = pathlib.Path(__file__).parents[1] / "images"
_CONTAINERFILE, _SETTINGS = _IMAGES / "Containerfile", _IMAGES / "containers.conf"
_SUITES = {"3.9": "bullseye", "3.11": "bookworm", "3.13": "trixie"}
_WALLS = ("--init", "--network=none", "--read-only", "--cap-drop=ALL", "--env=HOME=/tmp")
_SERVICE_TIMEOUT_S, _END_TIMEOUT_S, _PULL_TIMEOUT_S, _PROBE_TIMEOUT_S = 30.0, 30.0, 120.0, 60.0
TRIED_AGAIN_S = 3600.0
"""After which an image is tried again that could not be built."""
_SERVICE_IDLE_S = 300  # after which a service ends whose host was killed, where the kernel does not see to it

_log = logging.getLogger(__name__)


@functools.cache
def problem() -> str | None:
    """Why there can be no containers here; None where there can: one has been started to see."""
    if shutil.which("podman") is None:
        return "podman is not installed (on Debian: apt-get install podman runc netavark iptables catatonit)"
    if importlib.util.find_spec("podman") is None:
        return "podman-py is not installed (pip install 'ldm_jax[containers]')"
    # `podman info` succeeds where no container can start. This one needs no image: it sees the machine's own programs.
    folders = [f"--volume={path}:{path}:ro" for path in ("/usr", "/lib", "/lib64") if os.path.isdir(path)]
    try:
        with tempfile.TemporaryDirectory() as root:
            result = _podman(
                *("run", "--rm", *_WALLS, *folders, "--rootfs", root, "/usr/bin/env"),
                check=False,
                timeout_s=_PROBE_TIMEOUT_S,
            )
    except subprocess.TimeoutExpired:
        return f"a container did not end within {_PROBE_TIMEOUT_S:g} s"
    return None if result.returncode == 0 else f"a container cannot start: {result.stderr.strip()[-500:]}"


def tag(spec: venvs.VenvSpec) -> str:
    """The name of a group's image, which follows everything that it is made of."""
    containerfile = _containerfile(spec)
    made_of = hashlib.sha256("\n".join([spec.digest, *spec.apt, containerfile.read_text("utf-8")]).encode())
    if containerfile != _CONTAINERFILE:  # it may use all that is in its folder
        for path in sorted(containerfile.parent.iterdir()):
            if path.is_file() and path.name != "group.json":
                made_of.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"localhost/ldm_jax/{spec.name}:{made_of.hexdigest()[:16]}"


def digest(name: str) -> str:
    """The digest of an image that is here, `sha256:...`: it stands for all that is in the image."""
    return f"sha256:{_podman('image', 'inspect', '--format={{.Id}}', name).stdout.strip().removeprefix('sha256:')}"


def is_image_built(spec: venvs.VenvSpec) -> bool:
    """Whether a group's image has been built, and has been seen to run."""
    return _mark(spec).exists()


def may_be_built(spec: venvs.VenvSpec) -> bool:
    """Whether a group can have an image here: there can be containers, and none of the last hour could not be built."""
    if problem() is not None:
        return False
    try:
        return time.time() - _failed(spec).stat().st_mtime > TRIED_AGAIN_S
    except FileNotFoundError:
        return True


def leave(spec: venvs.VenvSpec) -> None:
    """Has a group's image, which could not be built, not tried again for an hour: each attempt takes its time."""
    _failed(spec).parent.mkdir(parents=True, exist_ok=True)
    _failed(spec).touch()


def build_image(spec: venvs.VenvSpec) -> str:
    """The name of a group's image, which is built if it is not there.

    Raises:
      LibraryMissingError: there can be no containers here, or the build fails.
    """
    if why := problem():
        raise LibraryMissingError(f"{spec.name} cannot run in a container: {why}")
    name = tag(spec)
    if is_image_built(spec) and _exists(name):
        return name
    folder = cache_folder() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with venvs.locked(folder / f"{spec.name}.lock"):
        if is_image_built(spec) and _exists(name):
            return name
        start = time.monotonic()
        _log.warning("building the container image %s, this once", name)
        containerfile = _containerfile(spec)
        arguments = {"APT": " ".join(spec.apt), "BUILD": " ".join(spec.build)}
        if re.search(r"(?m)^ARG BASE\b", containerfile.read_text("utf-8")):
            arguments["BASE"] = _base(spec.python, folder)
        options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        for path in ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf"):
            if os.path.exists(path):  # the machine may reach its package index by these; no layer keeps them
                options.append(f"--volume={path}:{path}:ro")
        context = str(spec.requirements.parent)
        _podman("build", "--network=host", f"--tag={name}", f"--file={containerfile}", *options, context)
        # Where a shared library is missing, this is where it is seen.
        _podman("run", "--rm", *_WALLS, name, PYTHON, "-I", "-c", spec.trial)
        _mark(spec).touch()
        _log.warning("built the container image %s in %.0f s", name, time.monotonic() - start)
    return name


class ContainerProcess:
    """A worker in a container of its own; see `host.Process`.

    The container sees no network but its loopback, no file of the host but the program and what is in `path`, all
    read-only; it has no capabilities and cannot gain any, and its memory, CPU time and processes are limited. When the
    worker ends, for whatever reason, the container ends and removes itself.

    Args:
      image: its name.
      folder: of the host, for the socket, until the worker has connected.
      variables: environment variables.
      path: folders and files of the host that the worker may read.
      memory_limit_bytes: what the worker may hold.
      start_timeout_s: seconds until it must have connected.

    Attributes:
      name: of the container.

    Raises:
      WorkerFaultError: the container does not start.
    """

    def __init__(
        self,
        image: str,
        folder: str,
        variables: collections.abc.Mapping[str, str],
        path: collections.abc.Sequence[str],
        memory_limit_bytes: int,
        start_timeout_s: float,
    ):
        # Named by us: what a service that was killed has half made can be found and removed.
        self.name = leftovers.name_container()
        run = tempfile.mkdtemp(prefix="run-", dir=folder)
        os.chmod(run, 0o711)  # the worker is another user
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(f"{run}/socket")
            os.chmod(f"{run}/socket", 0o666)
            listener.listen(1)
            readable = {str(SERVER.parent): _PROGRAM, run: "/run/ldm_jax", **{each: each for each in path}}
            with _service(run) as client:
                leftovers.remove_unstarted(client)
                container = _create(client, image, self.name, variables, readable, memory_limit_bytes)
                container.start()
                container.reload()
                self._monitor = os.pidfd_open(container.attrs["State"]["ConmonPid"])
            self.connection = self._accept(listener, start_timeout_s)
        except BaseException as error:  # podman-py raises errors of many kinds
            _podman("rm", "--force", "--ignore", self.name, check=False)
            if isinstance(error, WorkerFaultError) or not isinstance(error, Exception):
                raise
            why = f"{error!r}, {getattr(error, 'explanation', None)}, because of {error.__cause__!r}"
            raise WorkerFaultError("start", f"a container of {image} cannot be started: {why}") from error
        finally:
            listener.close()
            shutil.rmtree(run, ignore_errors=True)
        credentials = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid = struct.unpack("3i", credentials)[0]
        self._process = os.pidfd_open(self.pid)

    def ended(self, timeout_s: float) -> str | None:
        ready, _, _ = select.select([self._monitor], [], [], timeout_s)
        return "ended, and its container with it" if ready else None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        # Its monitor removes the container, and is the last to go.
        if self.ended(_END_TIMEOUT_S) is None:
            _podman("rm", "--force", "--ignore", self.name, check=False)
        for descriptor in (self._process, self._monitor):
            os.close(descriptor)
        self.connection.close()

    def _accept(self, listener: socket.socket, timeout_s: float) -> socket.socket:
        ready, _, _ = select.select([listener.fileno(), self._monitor], [], [], timeout_s)
        if listener.fileno() in ready:
            return listener.accept()[0]
        how = "ended before it connected" if ready else f"has not connected within {timeout_s:g} s"
        os.close(self._monitor)
        raise WorkerFaultError("start", f"the worker in the container {how}")


def _create(
    client: typing.Any,
    image: str,
    name: str,
    variables: collections.abc.Mapping[str, str],
    readable: collections.abc.Mapping[str, str],
    memory_limit_bytes: int,
) -> typing.Any:
    """A container that is ready to start; `readable` says where each file or folder of the host is in it."""
    limit = memory_limit_bytes + HARD_MEMORY_MARGIN_BYTES
    mounts: list[dict[str, typing.Any]] = [{"type": "tmpfs", "source": "tmpfs", "target": "/tmp"}]
    for source, target in readable.items():
        mounts.append({"type": "bind", "source": source, "target": target, "read_only": True})
    return client.containers.create(
        image,
        [PYTHON, "-I", f"{_PROGRAM}/{SERVER.name}", "/run/ldm_jax/socket"],
        name=name,
        environment={**QUIET, "HOME": "/tmp", "TMPDIR": "/tmp", **variables},
        working_dir="/tmp",
        user="65534:65534",
        network_mode="none",
        read_only=True,
        cap_drop=["ALL"],
        no_new_privileges=True,
        mem_limit=limit,
        memswap_limit=limit,
        cpu_period=100_000,
        cpu_quota=CPUS * 100_000,
        pids_limit=PIDS_LIMIT,
        init=True,  # ends with the worker, and everything in the container with it
        auto_remove=True,
        mounts=mounts,
    )


def _containerfile(spec: venvs.VenvSpec) -> pathlib.Path:
    own = spec.requirements.parent / "Containerfile"
    return own if own.exists() else _CONTAINERFILE


def _mark(spec: venvs.VenvSpec) -> pathlib.Path:
    return cache_folder() / "images" / f"{tag(spec).rpartition('/')[2].replace(':', '-')}.built"


def _failed(spec: venvs.VenvSpec) -> pathlib.Path:
    return _mark(spec).with_suffix(".failed")


@contextlib.contextmanager
def _service(folder: str) -> collections.abc.Iterator[typing.Any]:
    """A client of a Podman service that lives as long as this context."""
    address = f"unix://{folder}/podman"
    # The kernel ends it with the thread that started it. Its own clock may run out in a long call: let that be late.
    # It is killed, never asked: asked while it makes a container, Podman 4.3 waits for itself, with its locks held, one
    # time in ten.
    ends_with_us = ["setpriv", "--pdeathsig=KILL"] if shutil.which("setpriv") else []
    command = [*ends_with_us, "podman", "system", "service", f"--time={_SERVICE_IDLE_S}", address]
    service = subprocess.Popen(
        command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + _SERVICE_TIMEOUT_S
        while not _listens(f"{folder}/podman"):
            if service.poll() is not None or time.monotonic() > end:
                raise WorkerFaultError("start", f"{' '.join(command)} does not serve; it ended with {service.poll()}")
            time.sleep(0.01)
        with importlib.import_module("podman").PodmanClient(base_url=address, timeout=60) as client:
            yield client
    finally:
        service.kill()
        service.wait()


def _listens(path: str) -> bool:
    """Whether someone takes connections there; the file exists a little earlier."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def _base(python: str, folder: pathlib.Path) -> str:
    """An image with a Python: from a registry, or else made of Debian's packages."""
    suite = _SUITES.get(python)
    if suite is None:
        raise LibraryMissingError(f"there is no base image for Python {python}, expected one of {', '.join(_SUITES)}")
    name, archive = f"localhost/ldm_jax/base:{suite}", folder / f"{suite}.tar"
    with venvs.locked(folder / f"{suite}.lock"):  # groups of one Python share it
        if _exists(name):
            return name
        if not archive.exists():
            official = f"docker.io/library/python:{python}-slim-{suite}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                if _podman("pull", "--quiet", official, check=False, timeout_s=_PULL_TIMEOUT_S).returncode == 0:
                    return official
            _bootstrap(suite, archive, official)
        _podman("import", "--quiet", str(archive), name)
    return name


def _bootstrap(suite: str, archive: pathlib.Path, official: str) -> None:
    if shutil.which("mmdebstrap") is None:
        raise LibraryMissingError(
            f"{official} cannot be pulled, and mmdebstrap, which could make a base image, is not installed "
            "(on Debian: apt-get install mmdebstrap debian-archive-keyring)"
        )
    _log.warning("making a base image of Debian %s, this once; it takes a few minutes", suite)
    part = archive.with_suffix(".part")
    packages = "ca-certificates,python3,python3-venv,python3-pip"
    command = ["mmdebstrap", "--variant=minbase", "--format=tar", f"--include={packages}", suite, str(part)]
    _run(command, {**os.environ}, check=True)
    part.rename(archive)


def _exists(name: str) -> bool:
    return _podman("image", "exists", name, check=False).returncode == 0


def _environment() -> dict[str, str]:
    return {**os.environ, "CONTAINERS_CONF": str(_SETTINGS)}


def _podman(*arguments: str, check: bool = True, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    return _run(["podman", *arguments], _environment(), check=check, timeout_s=timeout_s)


def _run(
    command: list[str], environment: dict[str, str], *, check: bool, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    if check and result.returncode:
        raise LibraryMissingError(
            f"{' '.join(command)} exited with status {result.returncode}: {(result.stdout + result.stderr)[-3000:]}"
        )
    return result
