"""The examples in the docstrings of what is used most."""

import doctest
import importlib

import pytest

EXAMPLES = (
    "data.open_dataset",
    "environments.find",
    "environments.libraries",
    "environments.list_ids",
    "environments.make",
    "environments.select",
    "environments.spec",
    "ldm_jax.evaluate",
    "ldm_jax.load",
    "ldm_jax.make_model",
    "ldm_jax.play",
    "ldm_jax.encoding.action_layout",
    "ldm_jax.rollout.run_episodes",
    "ldm_jax.spaces.leaves",
)


@pytest.mark.parametrize("path", EXAMPLES)
def test_the_example_of_a_public_function_prints_what_it_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, name = path.rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    (found,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert found.examples, f"{path} shows no example"
    report = []
    assert not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=report.append).failed, "".join(report)
