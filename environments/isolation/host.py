"""The host's end of one worker process: starting it, talking to it, and being certain that it is gone."""

from __future__ import annotations

import array
import collections.abc
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import tempfile
import time
import typing

import numpy as np

from ldm_jax.environment import EnvironmentFaultError

from .program import QUIET, SERVER, Isolation, WorkerFaultError, WorkerSpec
from .scratch import make_scratch

PROTOCOL = 4
HEAD = struct.Struct("<cII")
"""Of a message: its kind, the length of what follows in bytes, and the number of the question."""
MAX_MESSAGE_BYTES = 1 << 24
MAX_LOG_CHARS = 2000
GOODBYE_S = 2.0

_PROTOCOL_FAULT = "the worker is of another version than the host; remove the cache of virtual environments"


class Sent(typing.NamedTuple):
    """When a question was sent.

    Attributes:
      time_s: monotonic seconds.
      heartbeat: of the worker at that time.
    """

    time_s: float
    heartbeat: int


class Process(typing.Protocol):
    """A process that runs `worker/server.py`, wherever it runs.

    Attributes:
      connection: the host's end of its socket.
      pid: its number here.
    """

    connection: socket.socket
    pid: int

    def ended(self, timeout_s: float) -> str | None:
        """How it ended, as the end of a sentence; None if it goes on after so long."""

    def kill(self) -> None:
        """Ends it and all that it has started, and waits until nothing is left of it."""


class LocalProcess:
    """A process in a virtual environment; see `Process`. It leads a session and process group of its own.

    Args:
      python: the interpreter.
      folder: where it runs and keeps its temporary files.
      variables: environment variables beside the host's own.
      log: the file that it prints to.

    Raises:
      WorkerFaultError: the interpreter cannot be started.
    """

    def __init__(self, python: str, folder: str, variables: collections.abc.Mapping[str, str], log: typing.IO[bytes]):
        self.connection, theirs = socket.socketpair()
        # Not ours: what leads Python to our own packages.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        try:
            self._process = subprocess.Popen(
                [python, "-I", str(SERVER), str(theirs.fileno())],
                cwd=folder,
                env={**inherited, **QUIET, "TMPDIR": folder, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as error:
            self.connection.close()
            raise WorkerFaultError("start", f"{python} cannot be started: {error}") from error
        finally:
            theirs.close()
        self.pid = self._process.pid

    def ended(self, timeout_s: float) -> str | None:
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()


class Worker:
    """The host's end of one worker.

    Args:
      launch: starts the process, given the file that it prints to.
      job: what it is to serve (`WorkerSpec.job`); it begins at once, and `handshake` waits for it.

    Attributes:
      pid: of the process.
      attached: whether it has the file of arrays.
    """

    def __init__(self, launch: collections.abc.Callable[[typing.IO[bytes]], Process], job: dict[str, typing.Any]):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the worker
        try:
            self._process = launch(self._log)
        except BaseException:
            self._log.close()
            raise
        self._socket, self.pid, self.attached = self._process.connection, self._process.pid, False
        self._question = 0
        self._ready = select.poll()
        self._ready.register(self._socket, select.POLLIN)
        their_end, self._lifeline = os.pipe()
        try:
            self._hand_over(b"H", {"protocol": PROTOCOL, "job": job}, [their_end, self._log.fileno()])
        except WorkerFaultError:
            self.kill()
            raise
        finally:
            os.close(their_end)

    def handshake(self, timeout_s: float) -> dict[str, typing.Any]:
        """What the worker says of the environment it has made."""
        kind, content = self.receive(timeout_s)
        if kind == b"E":
            raise WorkerFaultError("refused" if content.get("reason") == "refused" else "start", content["text"])
        if kind != b"S" or content.get("protocol") != PROTOCOL:
            raise WorkerFaultError("start", _PROTOCOL_FAULT)
        return content

    def attach(self, content: dict[str, typing.Any], descriptor: int, timeout_s: float) -> None:
        """Hands over the file of arrays."""
        self._hand_over(b"A", content, [descriptor])
        self.receive(timeout_s)
        self.attached = True

    def send(self, kind: bytes, content: dict[str, typing.Any] | None = None) -> None:
        """Sends one message."""
        if self._poll(0):
            # It speaks though nobody has asked: an end, or bytes that would be taken for the next answer.
            self._read(1, 0.0)
            raise WorkerFaultError("garbage", "the worker wrote to the socket without being asked" + self._log_tail())
        body = b"" if content is None else json.dumps(content).encode()
        try:
            self._socket.sendall(self._head(kind, body) + body)
        except OSError as error:
            raise self._ended() from error

    def receive(
        self, timeout_s: float, heartbeat: np.ndarray | None = None, sent: Sent | None = None
    ) -> tuple[bytes, dict[str, typing.Any]]:
        """The next message.

        Args:
          timeout_s: time that one call to the library may take.
          heartbeat: `uint64 [1]`, rises with each call; None where the message is about a single one.
          sent: when the question was sent; None for now.

        Raises:
          WorkerFaultError: the end of the connection, silence, or what is not a message.
        """
        since, seen = sent or Sent(time.monotonic(), 0)
        while not self._poll(max(0.0, since + timeout_s - time.monotonic())):
            if heartbeat is None or int(heartbeat[0]) == seen:
                text = f"no answer within the limit of {timeout_s:g} s a call" + self._log_tail()
                raise WorkerFaultError("hang", text)
            since, seen = time.monotonic(), int(heartbeat[0])
        head = self._read(HEAD.size, timeout_s)
        kind, length, question = HEAD.unpack(head)
        if kind not in (b"S", b"E", b"K", b"F") or length > MAX_MESSAGE_BYTES or question != self._question:
            raise WorkerFaultError(
                "garbage", f"the worker wrote {head!r}, which begins no answer to what it was asked" + self._log_tail()
            )
        try:
            content = json.loads(self._read(length, timeout_s)) if length else {}
        except ValueError as error:
            raise WorkerFaultError("garbage", f"the worker sent a message that is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise WorkerFaultError("garbage", f"the worker sent {type(content).__name__}, expected an object")
        return kind, content

    def close(self) -> list[str]:
        """Lets the worker close its environments and go, then makes sure; the errors that closing them raised."""
        errors: list[str] = []
        with contextlib.suppress(WorkerFaultError):
            self.send(b"Q")
            _, content = self.receive(GOODBYE_S)
            errors = [str(text) for text in content.get("errors", ())]
        self.kill()
        return errors

    def kill(self) -> None:
        """Ends the process and all that it has started; a second call does nothing."""
        if self._socket.fileno() < 0:
            return
        self._process.kill()
        os.close(self._lifeline)
        self._log.close()

    def _hand_over(self, kind: bytes, content: dict[str, typing.Any], descriptors: list[int]) -> None:
        """Sends a message with descriptors of files."""
        body = json.dumps(content).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._socket.sendmsg([self._head(kind, body)], rights)
            self._socket.sendall(body)
        except OSError as error:
            raise self._ended() from error

    def _head(self, kind: bytes, body: bytes) -> bytes:
        self._question = (self._question + 1) % (1 << 32)
        return HEAD.pack(kind, len(body), self._question)

    def _poll(self, timeout_s: float) -> bool:
        return bool(self._ready.poll(timeout_s * 1000))

    def _read(self, size: int, timeout_s: float) -> bytes:
        data = b""
        while len(data) < size:
            if not self._poll(timeout_s):
                raise WorkerFaultError("garbage", f"the worker wrote {len(data)} of {size} bytes" + self._log_tail())
            try:
                part = self._socket.recv(size - len(data))
            except OSError as error:
                raise self._ended() from error
            if not part:
                raise self._ended()
            data += part
        return data

    def _ended(self) -> WorkerFaultError:
        how = self._process.ended(GOODBYE_S) or "closed the connection"
        return WorkerFaultError("crash", f"the worker {how}" + self._log_tail())

    def _log_tail(self) -> str:
        """The end of what the worker printed, to end a report with."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), MAX_LOG_CHARS, max(0, size - MAX_LOG_CHARS)).decode("utf-8", "replace")
        return f"; its log ends: {text.strip()}" if text.strip() else ""


def start_worker(spec: WorkerSpec, job: dict[str, typing.Any], isolation: Isolation, scratch: str) -> Worker:
    """Starts a worker, in a container where the spec names an image.

    Args:
      spec: what it runs.
      job: what it is told (`WorkerSpec.job`).
      isolation: what it may cost.
      scratch: a folder of this machine for what it writes.

    Raises:
      WorkerFaultError: it cannot be started.
    """

    def launch(log: typing.IO[bytes]) -> Process:
        if not spec.image:
            return LocalProcess(spec.python, scratch, spec.variables, log)
        from .containers import ContainerProcess

        readable = (*spec.path, *filter(None, [spec.bridge, spec.expert_file]))
        place = (spec.image, scratch, spec.variables, readable)
        return ContainerProcess(*place, isolation.memory_limit_bytes, isolation.start_timeout_s)

    return Worker(launch, job)


def list_registered(spec: WorkerSpec, isolation: Isolation) -> dict[str, str]:
    """What the imports of a worker put into the registry.

    Args:
      spec: of a worker without a name.
      isolation: where it runs and how long that may take.

    Returns:
      The module that each id's environment comes from, by id.

    Raises:
      EnvironmentFaultError: the libraries cannot be imported.
    """
    scratch = make_scratch()
    try:
        worker = start_worker(spec, spec.job(isolation), isolation, scratch.path)
        try:
            return worker.handshake(isolation.start_timeout_s)["ids"]
        finally:
            worker.kill()
    except WorkerFaultError as error:
        raise EnvironmentFaultError(f"the environments of {spec.library} cannot be listed: {error}") from None
    finally:
        scratch.remove()
