"""Workers in containers: how they are walled in, that faults end as they do elsewhere, and that nothing is left."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import containers_here
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_isolation import (
    LIBRARY,
    LIMIT_S,
    OF_A_ROW,
    OF_A_WORKER,
    alive,
    check_killed_workers_are_replaced,
    pids,
    play,
    row,
    same,
    soon,
    worker_spec,
)

import environments
from data import collect as collecting
from data.references import ReferencePolicy, ScoredReference
from data.store import create_dataset, open_dataset
from environments.isolation import IsolatedEnvironment, Isolation, containers, groups, scratch, venvs
from experiments import collect
from ldm_jax import cards
from ldm_jax.encoding.actions import Distribution
from ldm_jax.types import Agent

# By the version of Python: a library whose image has it, and the interface that the misbehaving one then speaks.
IMAGES = {
    "3.9": ("procgen", "gym"),
    "3.13": ("gym-classics", "gymnasium"),
}


@pytest.fixture(scope="module", params=IMAGES)
def image(request):
    return built(request.param)


@pytest.fixture(scope="module")
def new_image():
    return built("3.13")


def built(python):
    """The name of an image, and what else a program in it needs to be told."""
    containers_here.need()
    library, api = IMAGES[python]
    return {"image": containers.build_image(groups.isolated_libraries()[library].venv), "api": api}


@contextlib.contextmanager
def make(image, name, batch_size=4, **limits):
    environment = IsolatedEnvironment(
        worker_spec(name, containers.PYTHON, **image),
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
        for place in ("/", "/ldm_jax_worker", "/run/ldm_jax", str(LIBRARY)):
            assert "ro" in by_place[place][1], place
        assert by_place["/tmp"][0] == "tmpfs"
        hard = str(limit + containers.HARD_MEMORY_MARGIN_BYTES)
        assert cgroup(environment, "memory.max", "memory.limit_in_bytes") == [hard]
        assert cgroup(environment, "pids.max") == [str(containers.PIDS_LIMIT)]
        assert cgroup(environment, "cpu.max", "cpu.cfs_quota_us")[0] == str(containers.CPUS * 100_000)


def test_the_interface_of_gymnasium_and_that_of_gym_0_21_pass_the_kit(image):
    environments.check_environment(
        lambda batch_size, time_limit: IsolatedEnvironment(
            worker_spec("Steady", containers.PYTHON, **image), batch_size, time_limit, Isolation()
        )
    )


@pytest.mark.parametrize("name", ["NanReward", "WrongShape", "NoSuchCategory", *OF_A_WORKER, "Leak"])
def test_faults_in_containers_are_survived(image, name):
    kind, text = (OF_A_ROW | OF_A_WORKER | {"Leak": ("memory", "more than its limit")})[name]
    if kind == "crash":  # a container takes a while to end, longer on a busy machine than a report waits for it
        text = "its container|closed the connection"
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
    with make({image!r}, {name!r}, 2, call_timeout_s=1000) as environment:
        state, _ = environment.reset(jax.random.key(0))
        print(*pids(environment), *names(environment), flush=True)
        environment.step(state, np.array([3, 0]))
"""


def host(image, name, **variables):
    code = textwrap.dedent(HOST.format(tests=str(pathlib.Path(__file__).parent), image=image, name=name))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )


def service_of(pid):
    """The number of the Podman service that a process has started; None where there is none."""
    for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in file.read_text().split():
                if pathlib.Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"podman\0system\0service"):
                    return int(child)
    return None


def left_of(pid):
    """The containers and the processes around them that are there of a host, whatever their state."""
    name = f"ldm_jax-{pid}-"
    # Podman's own filter lets the working containers of killed builds through, whatever their names.
    listed = containers._podman("ps", "--all", "--external", "--format={{.Names}}").stdout
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in (listed + running).splitlines() if name in line]


def test_containers_end_when_the_host_is_killed(new_image):
    victim = host(new_image, "Hang")
    words = victim.stdout.readline().split()
    running, left = words[:2], words[2:]
    assert len(left) == 2 and all(map(alive, running)) and all(map(exists, left))
    time.sleep(0.3)
    victim.kill()
    victim.wait()
    victim.stdout.close()
    assert soon(lambda: not any(map(alive, running)))
    assert soon(lambda: not any(map(exists, left)))
    assert soon(lambda: not left_of(victim.pid))


def test_nothing_is_left_of_hosts_that_are_killed_while_their_containers_start(new_image, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # a short path: the names of sockets are limited
        delays_s = (0.0, 0.08, 0.15, 0.3)
        victims = [host(new_image, "Steady", TMPDIR=folder) for _ in delays_s]
        services = []
        for victim, delay_s in zip(victims, delays_s, strict=True):
            assert soon(lambda victim=victim: service_of(victim.pid), 60)
            services.append(service_of(victim.pid))
            time.sleep(delay_s)
            victim.kill()
            victim.wait()
            victim.stdout.close()
        assert soon(lambda: not any(map(alive, filter(None, services))), 20)
        # What was made and never started is removed by the next who starts one, what it wrote by the next folder.
        with make(new_image, "Steady", 1):
            pass
        for victim in victims:
            assert soon(lambda victim=victim: not left_of(victim.pid)), left_of(victim.pid)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        _, remove = scratch.make_scratch()
        remove()
        assert not os.listdir(folder)


def test_containers_killed_between_and_in_the_middle_of_steps_are_replaced(image):
    with make(image, "Slow", 2, call_timeout_s=5.0) as environment:
        check_killed_workers_are_replaced(environment, lambda: containers._podman("kill", names(environment)[0]))
        assert service_of(os.getpid()) is None
    assert soon(lambda: not left_of(os.getpid())), left_of(os.getpid())


def test_a_service_that_is_killed_is_started_anew_and_the_run_goes_on(new_image):
    """It only lives while a container is started: that is where it is killed, sooner and later."""

    def kill_service(delay_s):
        if soon(lambda: service_of(os.getpid()), 30):
            time.sleep(delay_s)
            with contextlib.suppress(ProcessLookupError, TypeError):  # it may be done by now
                os.kill(service_of(os.getpid()), signal.SIGKILL)

    with make(new_image, "Steady", 2, call_timeout_s=20.0, max_faults=50) as environment:
        state, _ = environment.reset(jax.random.key(0))
        for delay_s in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3):
            os.kill(pids(environment)[0], signal.SIGKILL)
            state, time_step = environment.step(state, np.zeros(2, np.int32))
            assert time_step.truncated[0] and not time_step.truncated[1]
            killer = threading.Thread(target=kill_service, args=(delay_s,))
            killer.start()
            state, time_step = environment.step(state, np.zeros(2, np.int32))
            killer.join()
            assert time_step.first[0] and not time_step.first[1]
        assert environment.faults["crash"] == 6 and environment.faults["start"] > 0, environment.faults
        assert service_of(os.getpid()) is None
        folder = environment._scratch
        assert not os.listdir(folder)
    assert not os.path.exists(folder)
    assert soon(lambda: not left_of(os.getpid())), left_of(os.getpid())


def test_a_group_may_bring_a_containerfile_of_its_own(tmp_path, monkeypatch):
    containers_here.need()
    (tmp_path / "requirements.txt").write_text("")
    spec = venvs.VenvSpec("own", "3.13", tmp_path / "requirements.txt", (), ("json",), ())
    shared = containers.tag(spec)
    lines = ["ARG BASE", "FROM ${BASE}", "COPY said.txt /said.txt", "RUN python3 -m venv --without-pip /venv"]
    (tmp_path / "Containerfile").write_text("\n".join(lines))
    (tmp_path / "said.txt").write_text("one")
    before = containers.tag(spec)
    (tmp_path / "said.txt").write_text("two")
    assert len({shared, before, containers.tag(spec)}) == 3  # its files make a difference
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "cache"))
    name = containers.build_image(spec)
    try:
        assert containers._podman("run", "--rm", name, "cat", "/said.txt").stdout == "two"
        assert re.fullmatch("sha256:[0-9a-f]{64}", containers.digest(name))
    finally:
        containers._podman("rmi", name)


def test_the_card_of_data_that_were_collected_in_a_container_names_its_image(tmp_path, new_image, monkeypatch):
    id = "gym-classics/5Walk-v0"
    environment = environments.make(id)
    environment.close()

    def go_right(params, carry, time_step, key):
        rows = len(time_step.observation)
        logits, nothing = jnp.zeros((rows, 2)).at[:, 1].set(1e6), jnp.zeros((rows, 0))
        return carry, jnp.ones(rows, jnp.int32), Distribution(logits, nothing, nothing)

    policy = ReferencePolicy(
        Agent(lambda rows: (), go_right), (), cards.Reference("scripted", "greedy", 0, 0), environment.spec, ()
    )
    scored = ScoredReference(policy, cards.Returns(((0.0,),)), cards.Returns(((1.0,),)))
    config = collect.CollectStageConfig(data=collecting.CollectConfig(streams=4, steps=32, block=32))
    monkeypatch.setattr(collect, "_load", lambda workdir, id: scored)  # a script is no reference that could be saved
    create_dataset(tmp_path / "dataset")
    collected = collect._collect(config, collect.CollectUnit(id, tmp_path, 128), lambda steps: None)
    assert collected["streams"] == 4
    assert (
        open_dataset(tmp_path / "dataset").card(id).image_digest
        == environment.spec.image_digest
        == containers.digest(new_image["image"])
    )
