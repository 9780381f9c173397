"""A signal ends a script in one line, wherever the script is just then."""

import os
import signal
import subprocess
import sys

import pytest

_PYTHON = "while True: time.sleep(0.01)"
_CALLBACK = """
shape = jax.ShapeDtypeStruct((), np.float32)
step = lambda i, x: jax.pure_callback(lambda x: time.sleep(0.01) or x, shape, x)
float(jax.jit(lambda x: jax.lax.fori_loop(0, 10_000, step, x))(np.float32(1)))
"""
_SCRIPT = """
import logging, time, jax, numpy as np
from experiments.harness import progress, signals
logging.basicConfig(level=logging.INFO, format="%(message)s")
progress.logger.setLevel(logging.INFO)
with signals.ending():
    print("started", flush=True)
    {work}
"""


@pytest.mark.parametrize("work", [_PYTHON, _CALLBACK], ids=["python", "callback"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_script_that_is_asked_to_end_says_so_in_one_line(work, number, code):
    script = _SCRIPT.format(work=work.replace("\n", "\n    "))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # else JAX says which others it has not found
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, _ = process.communicate()
    assert process.returncode == code, out
    assert out.splitlines() == [f"interrupted signal={number} next=start it again with the same flags"]


_FINALIZER = """
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0)  # where Python looks for signals

import signal
Finalized()
time.sleep(10)
"""


def test_a_signal_that_comes_where_errors_are_ignored_is_not_lost():
    script = _SCRIPT.format(work=_FINALIZER.replace("\n", "\n    "))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines() == ["interrupted signal=15 next=start it again with the same flags"]
