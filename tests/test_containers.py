"""Workers in containers: how they are walled in, that faults end as they do elsewhere, and that nothing is left."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from test_isolation import LIBRARY, LIMIT_S, OF_A_ROW, OF_A_WORKER, alive, pids, play, program, row, same, soon

import environments
from environments import containers, groups
from environments.isolation import IsolatedEnvironment, Isolation, Program

pytestmark = pytest.mark.builds


@pytest.fixture(scope="module")
def image():
    if why := containers.problem():
        pytest.skip(why)
    return containers.build(groups.libraries()["minigrid"].recipe)


@contextlib.contextmanager
def make(image, name, batch_size=4, **limits):
    environment = IsolatedEnvironment(
        program(name, containers.PYTHON, image=image),
        batch_size,
        None,
        Isolation(**({"workers": 2, "call_timeout_s": LIMIT_S} | limits)),
    )
    try:
        yield environment
    finally:
        environment.close()


def names(environment):
    return [worker._process.name for worker in environment._workers if worker is not None]


def exists(name):
    return containers._podman("container", "exists", name, check=False).returncode == 0


def inside(environment):
    """The folder in which the kernel describes the first worker."""
    return pathlib.Path(f"/proc/{pids(environment)[0]}")


def cgroup(environment, *files):
    """The first of some settings of the worker's control group, old names and new ones."""
    for line in (inside(environment) / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in files:
            for root in (f"/sys/fs/cgroup/{controllers}", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                if (file := pathlib.Path(root + path) / name).exists():
                    return file.read_text().split()
    raise AssertionError(f"no control group has any of {files}")


def test_a_container_sees_and_may_do_next_to_nothing(image):
    limit = 1 << 30
    with make(image, "Steady", memory_limit_bytes=limit) as environment:
        status = dict(
            line.split(":\t", 1) for line in (inside(environment) / "status").read_text().splitlines() if ":\t" in line
        )
        assert status["NoNewPrivs"] == "1"
        assert {status[f"Cap{which}"] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65534"}
        interfaces = (inside(environment) / "net" / "dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
        mounts = [line.split()[:4] for line in (inside(environment) / "mounts").read_text().splitlines()]
        by_place = {place: (kind, options.split(",")) for _, place, kind, options in mounts}
        for place in ("/", "/server.py", "/run/ldm_jax", str(LIBRARY)):
            assert "ro" in by_place[place][1], place
        assert by_place["/tmp"][0] == "tmpfs"
        hard = str(limit + containers.HARD_MEMORY_MARGIN_BYTES)
        assert cgroup(environment, "memory.max", "memory.limit_in_bytes") == [hard]
        assert cgroup(environment, "pids.max") == [str(containers.PIDS_LIMIT)]
        assert cgroup(environment, "cpu.max", "cpu.cfs_quota_us")[0] == str(containers.CPUS * 100_000)


def test_environments_in_containers_pass_the_kit(image):
    program = Program(
        python=containers.PYTHON,
        image=image,
        library="gymnasium",
        name="CartPole-v1",
        api="gymnasium",
        imports=(),
        distribution="gymnasium",
        domain="test",
    )

    def build(batch_size, time_limit):
        return IsolatedEnvironment(program, batch_size, time_limit, Isolation())

    environments.check_environment(build)


@pytest.mark.parametrize("library", ["procgen", "minigrid"])
def test_python_3_9_and_3_13_pass_the_kit_in_containers(image, library):
    found = groups.libraries()[library]
    for name in (found.ids[0], found.ids[-1]):
        environments.check_environment(
            lambda batch_size, time_limit, name=name: environments.make(
                f"{library}/{name}", batch_size, time_limit=time_limit, isolation="container"
            )
        )


@pytest.mark.parametrize("name", ["NanReward", "WrongShape", "NoSuchCategory", *OF_A_WORKER, "Leak"])
def test_faults_in_containers_are_survived(image, name):
    kind, text = (OF_A_ROW | OF_A_WORKER | {"Leak": ("memory", "more than its limit")})[name]
    text = "its container" if kind == "crash" else text
    struck = [1] if name in OF_A_ROW else [0, 1]
    spared = [index for index in range(4) if index not in struck]
    actions = np.random.default_rng(0).integers(0, 3, (25, 4))
    with make(image, "Steady") as environment:
        expected = play(environment, actions)
    actions[2, 1] = 3
    with make(image, name, memory_limit_bytes=200 << 20) as environment:
        play(environment, actions[:0])
        before = names(environment)
        seen = play(environment, actions)
        assert environment.faults == {kind: 1}
        assert re.search(text, environment.reports[0].text), environment.reports[0].text
        after = names(environment)
        assert (before == after) == (name in OF_A_ROW) and before[1] == after[1]
        assert before == after or not exists(before[0])
    assert all(same(one, other, spared) for one, other in zip(seen, expected, strict=True))
    (t,) = [t for t, time_step in enumerate(seen) if time_step.truncated[1]]
    assert row(seen[t], struck).truncated.all() and row(seen[t + 1], struck).first.all()
    assert not any(map(exists, after))


HOST = """
    import sys, jax, numpy as np
    sys.path.insert(0, {tests!r})
    from test_containers import make, names, pids
    with make({image!r}, "Hang", 2, call_timeout_s=1000) as environment:
        state, _ = environment.reset(jax.random.key(0))
        print(*pids(environment), *names(environment), flush=True)
        environment.step(state, np.array([3, 0]))
"""


def test_containers_end_when_the_host_is_killed(image):
    code = textwrap.dedent(HOST.format(tests=str(pathlib.Path(__file__).parent), image=image))
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    words = host.stdout.readline().split()
    running, left = words[:2], words[2:]
    assert len(left) == 2 and all(map(alive, running)) and all(map(exists, left))
    time.sleep(0.3)
    host.kill()
    host.wait()
    host.stdout.close()
    assert soon(lambda: not any(map(alive, running)))
    assert soon(lambda: not any(map(exists, left)))


def test_a_container_killed_from_outside_is_replaced_and_no_service_is_left(image):
    with make(image, "Steady", 2) as environment:
        state, _ = environment.reset(jax.random.key(0))
        containers._podman("kill", names(environment)[0])
        state, time_step = environment.step(state, np.zeros(2, np.int32))
        assert time_step.truncated.tolist() == [True, False]
        os.kill(pids(environment)[0], signal.SIGKILL)  # of the second worker: the first is gone
        state, time_step = environment.step(state, np.zeros(2, np.int32))
        assert time_step.first.tolist() == [True, False] and time_step.truncated.tolist() == [False, True]
        services = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
        assert not re.search(rf"(?m)^\s*{os.getpid()} podman system service", services)
