"""What hosts that were killed have begun of containers and not started: it has no end of its own."""

from __future__ import annotations

import collections.abc
import contextlib
import json
import logging
import os
import pathlib
import re
import signal
import typing
import uuid

_log = logging.getLogger(__name__)


def name_container() -> str:
    """A new name for a container of this process, by which what is left of it can be found once the process is gone."""
    return f"ldm_jax-{os.getpid()}-{uuid.uuid4().hex}"


def remove_unstarted(client: typing.Any) -> None:
    """Removes the containers that killed hosts have begun to make and not started; those that ran remove themselves.

    Args:
      client: of a Podman service.
    """
    try:
        # podman-py's own list leaves out those of which there is only the file system so far.
        asked = {"all": True, "external": True, "filters": json.dumps({"name": ["^ldm_jax-"]})}
        for listed in client.api.get("/containers/json", params=asked).json():
            name = listed["Names"][0]
            if listed["State"] in ("created", "initialized", "storage") and _is_left(name):
                client.api.delete(f"/containers/{name}", params={"force": True})
    except Exception as error:  # others may remove the same ones, and a list fails if one goes while it is made
        _log.debug("containers that a killed host left were not removed: %r", error)
    for pid in _waiting():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_left(name: str) -> bool:
    """Whether a container of this name is of a process that is gone."""
    host = re.fullmatch(r"ldm_jax-(\d+)-[0-9a-f]{32}", name)
    return host is not None and not os.path.exists(f"/proc/{host[1]}")


def _waiting() -> collections.abc.Iterator[int]:
    """Processes that were to become the workers of hosts that are gone; their monitors end with them.

    Podman may know nothing of them: its service was killed before it had written them down.
    """
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # it may be gone by now
            runtime, verb, *_ = _words(folder)
            if runtime.endswith("runc") and verb == "init":
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                monitor = _words(folder.parent / parent)
                if _is_left(monitor[monitor.index("-n") + 1]):
                    yield int(folder.name)


def _words(process: pathlib.Path) -> list[str]:
    """The command line of a process, by its folder."""
    return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
