"""The catalog that is shipped, what is asked of it, and how it is made."""

import collections
import dataclasses
import datetime
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import environments
import ldm_jax
from environments import registry, verification
from environments.catalog import entries, taxonomy
from environments.isolation import groups, venvs
from experiments.report import catalog_page
from ldm_jax import spaces

LINES = [line for library in entries.catalogued() for line in entries.entries(library).values()]
WORKS = [line for line in LINES if line.verified]
FAILS = [line for line in LINES if not line.verified]
LIBRARIES = sorted({line.library for line in WORKS})
DOMAINS = (
    *("robotics", "manipulation", "locomotion", "driving", "trading", "inventory", "cybersecurity", "energy"),
    *("health", "games", "board games", "navigation", "memory", "NetHack"),
)


# What is shipped.


def test_the_catalog_reaches_as_far_as_it_says():
    assert len(WORKS) >= 3000 and len({line.id for line in LINES}) == len(LINES)
    assert len({line.task for line in WORKS}) >= 1900
    assert len(LIBRARIES) >= 30
    assert set(DOMAINS) <= {line.domain for line in WORKS} <= set(taxonomy.DOMAINS)


def test_every_library_of_this_package_is_in_the_catalog_and_works():
    assert set(LIBRARIES) == {*registry.BUILT_IN, *groups.isolated_libraries()}
    for library in groups.isolated_libraries().values():
        assert {line.version for line in entries.entries(library.name).values()} == {library.version}


def test_lines_stand_in_the_file_of_their_library_in_order():
    for path in entries.CATALOG.glob("*.jsonl"):
        lines = entries.read_entries(path)
        assert [line.id for line in lines] == sorted(f"{path.stem}/{line.name}" for line in lines)
        assert all(line.library == path.stem for line in lines)


@pytest.mark.parametrize("library", LIBRARIES)
def test_lines_follow_the_rules_of_today(library):
    for line in entries.entries(library).values():
        assert line == verification.name_anew(line)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_works_is_known_in_full(library):
    for line in entries.entries(library).values():
        if not line.verified:
            continue
        assert line.time_limit > 0 and line.steps_per_s > 0 and line.domain and line.version != "unknown"
        for declared in (line.observation_space, line.action_space):
            space = spaces.from_json(declared)
            assert spaces.to_json(space) == declared and spaces.leaves(space)


def test_a_reason_is_the_fault_itself_and_no_place_on_a_machine():
    assert FAILS
    for line in FAILS:
        assert line.reason == line.reason.strip() and len(line.reason) >= 10, line
        # No folder, frame of a traceback, beginning of one, or count of the run that found it.
        folder = re.search(r"(?<![\w:/])(/[\w.+-]+){2,}|[A-Z]:\\|site-packages", line.reason)
        assert not folder, f"{line.id}: {line.reason}"
        assert not re.search(r"\.py\b.*line \d+|Traceback|\(fault \d|rows \[0\]|^\.\.\.", line.reason), line.reason
        assert line.id not in line.reason.split(":")[0], line.reason
        assert line.steps_per_s == 0


_TRACEBACK = """it, step 3 after the reset, rows [0]: exception: ... ps/worker/server.py", line 420, in obey
    obey(row, command)
  File "/srv/somebody/venvs/x/lib/python3.11/site-packages/x/core.py", line 7, in step
    raise RangeError("p is 1.2")
x.core.RangeError: p is 1.2, see /srv/somebody/x/table.csv
It was 0.7 before. (fault 1 since the reset, expected at most 0; since it was made: 1 exception)"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (_TRACEBACK, "x.core.RangeError: p is 1.2, see table.csv"),
        ("a/b cannot be made: no display", "no display"),
        (
            "a/b, step 2 after the reset, rows [0]: nan: it is inf (fault 1 since the reset, expected ...",
            "nan: it is inf",
        ),
        ("hang: no answer within 60 s; its log ends: warning: old\nversion", "hang: no answer within 60 s"),
        (
            "crash: it was ended by SIGSEGV; its log ends: assertion",
            "crash: it was ended by SIGSEGV; its log ends: assertion",
        ),
        (KeyError(), "KeyError"),
        ("see https://some.where/a/b or 1/2", "see https://some.where/a/b or 1/2"),
    ],
)
def test_of_an_error_the_reason_is_what_is_said_last_and_first(error, reason):
    assert verification.reason_of(error) == reason
    assert verification.reason_of("long " * 100).endswith(" ...")


# What is asked of it.


def test_questions_are_answered_without_importing_or_building_anything(tmp_path):
    program = """
        import sys
        import environments
        from environments.catalog import entries as catalog

        def expected(**wanted):
            paths = [catalog.CATALOG / f"{name}.jsonl" for name in catalog.catalogued()]
            lines = [line for path in paths for line in catalog.read_entries(path)]
            return [line.id for line in lines if all(getattr(line, key) == value for key, value in wanted.items())]

        ids = environments.list_ids
        questions = [{"domain": "health"}, {"action": "MultiDiscrete"}, {"library": "nasim"}, {"library": "envpool"}]
        questions += [{"library": "ogbench", "domain": "navigation", "action": "Box"}]
        for question in questions:
            for verified in (True, False):
                assert sorted(ids(**question, verified=verified)) == sorted(expected(**question, verified=verified))
            assert len(ids(**question)) > 0
        assert sorted(ids(verified=None)) == sorted(expected())
        assert len(environments.select("per_family=1 limit=500")) == 500
        foreign = {"gymnax", "envpool", "jumanji", "pgx", "navix", "brax", "craftax", "mujoco"} & set(sys.modules)
        assert not foreign, foreign
    """
    cache = tmp_path / "cache"
    environment = {**os.environ, "LDM_JAX_CACHE": str(cache)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=environment)
    assert not cache.exists()


def test_no_domain_or_kind_of_action_is_lost_among_the_answers():
    for domain, count in collections.Counter(line.domain for line in WORKS).items():
        assert len(environments.list_ids(domain=domain)) == count
    for action, count in collections.Counter(line.action for line in WORKS).items():
        assert len(environments.list_ids(action=action)) == count


def select(query):
    return environments.select(query).ids


def test_terms_all_hold_and_values_are_one_or_the_other_whatever_their_case():
    for library, domain in itertools.product(("nasim", "pgx", "jumanji"), ("cybersecurity", "board games", "games")):
        wanted = [line.id for line in WORKS if line.library == library and line.domain == domain]
        if wanted:
            assert select(f"library={library} domain={domain.upper().replace(' ', '_')}") == wanted
    assert select("library=nasim,pgx") == [line.id for line in WORKS if line.library in ("nasim", "pgx")]
    assert select("id=gymnax/C* action=Discrete") == [
        line.id for line in WORKS if line.id.startswith("gymnax/C") and line.action == "Discrete"
    ]
    fast = [line.id for line in WORKS if line.steps_per_s >= 5000 and line.time_limit <= 200]
    assert select("steps_per_s>=5e3 time_limit<=200") == fast and fast
    assert select("verified=no library=envpool") == [line.id for line in FAILS if line.library == "envpool"]
    assert select("") == [line.id for line in LINES if line.verified]


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(st.integers(1, 3), st.integers(1, 60), st.integers(0, 5), st.sampled_from(["family", "library"]))
def test_a_draw_is_the_same_each_time_and_a_smaller_one_is_part_of_a_larger_one(per, limit, seed, field):
    base = f"library=gymnax,minigrid,jumanji seed={seed}"
    whole, capped = select(base), select(f"{base} per_{field}={per}")
    drawn, more = (select(f"{base} per_{field}={per} limit={n}") for n in (limit, limit + 7))
    assert drawn == select(f"{base} limit={limit} per_{field}={per}"), "the order of the terms does not matter"
    assert [id for id in whole if id in {*drawn}] == drawn and {*drawn} <= {*more} <= {*capped} <= {*whole}
    assert len(drawn) == min(limit, len(capped))
    values = {line.id: getattr(line, field) for line in WORKS}
    available, counts = (collections.Counter(values[id] for id in ids) for ids in (whole, capped))
    assert counts == {value: min(per, count) for value, count in available.items()}


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("libary=nasim", "no field 'libary'.*did you mean library"),
        ("library=nasm", "library=nasm leaves none of .*did you mean nasim"),
        ("library=pgx,nasm", "library=nasm leaves none"),
        ("domain=board_game", "did you mean board games"),
        (
            "library=nasim domain=memory",
            "domain=memory leaves none of the 144 .*=nasim: domain is cybersecurity",
        ),
        ("library=nasim time_limit<=1", r"time_limit<=1 leaves none of the 144 .*: time_limit is \d+ to \d+ there"),
        ("library", "got 'library' in the selection, expected field=value"),
        ("library=", "expected field=value"),
        ("library>=nasim", "only time_limit and steps_per_s are numbers"),
        ("time_limit=long", "time_limit is 'long' in the selection, expected a number"),
        ("limit=0", "limit=0' in the selection, expected a positive whole number"),
        ("per_family=1.5", "expected a positive whole number"),
        ("domain='board games", "cannot be read"),
    ],
)
def test_a_selection_that_cannot_be_meant_names_what_is_near(query, words):
    with pytest.raises(environments.SelectionError, match=words):
        environments.select(query)


def test_ids_that_do_not_work_are_refused_with_the_reason_of_the_catalog():
    for line in FAILS[:: len(FAILS) // 20]:
        with pytest.raises(environments.UnknownEnvironmentError, match=re.escape(line.reason)):
            environments.make(line.id)


def _is_here(library):
    """Whether it can be made without installing or building anything."""
    if library in groups.isolated_libraries():
        return venvs.built(groups.isolated_libraries()[library].venv) is not None
    return importlib.util.find_spec(library) is not None


def _step_through(id, seed):
    isolation = "venv" if id.partition("/")[0] in groups.isolated_libraries() else "auto"
    environment = environments.make(id, 2, isolation=isolation)
    spec = environment.spec
    generator, line = np.random.default_rng(seed), entries.entries(spec.library)[id.partition("/")[2]]
    declared = (spaces.from_json(line.observation_space), spaces.from_json(line.action_space))
    assert (spec.id, spec.domain, spec.time_limit) == (id, line.domain, line.time_limit)
    assert (spec.observation_space, spec.action_space) == declared
    reset, step = environment.reset, environment.step
    if spec.jittable:
        reset, step = jax.jit(reset), jax.jit(step)
    state, time_step = reset(jax.random.key(seed))
    for _ in range(10):
        masks = [None if time_step.action_mask is None else time_step.action_mask[row, None] for row in range(2)]
        rows = [verification.random_action(spec.action_space, generator, mask) for mask in masks]
        state, time_step = step(state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows))
        spaces.check(spec.observation_space, time_step.observation, 2, "the observation")
        assert np.isfinite(np.asarray(time_step.reward)).all()
    environment.close()


def _draw(libraries, count, seed):
    """Ids of different libraries."""
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(sorted(libraries))[:count]
    return [str(generator.choice(environments.list_ids(str(library)))) for library in drawn]


def _today():
    return datetime.date.today().toordinal()


def _step_through_all(ids, seed):
    assert ids
    for id in ids:
        try:
            _step_through(id, seed)
        except ldm_jax.LibraryMissingError as error:  # a part of a library that its extra or the system brings
            assert "pip install" in str(error) or "apt-get install" in str(error), id
        except Exception as error:
            error.add_note(f"drawn with the seed {seed}: {id}")
            raise


def test_drawn_ids_step_through_make():
    _step_through_all(_draw(filter(_is_here, LIBRARIES), 6, seed=0), seed=0)


@pytest.mark.nightly
def test_ids_drawn_anew_every_day_step_through_make():
    _step_through_all(_draw(filter(_is_here, LIBRARIES), 6, _today()), _today())


@pytest.mark.nightly
@pytest.mark.builds
def test_ids_of_groups_drawn_anew_every_day_build_what_they_need_and_step():
    for id in _draw(groups.isolated_libraries(), 8, _today()):
        _step_through(id, _today())


# How it is made.


def _verify_library(output):
    command = [sys.executable, "-m", "experiments.verify_catalog", "--libraries=gymnasium", "--workers=1"]
    return subprocess.Popen([*command, f"--output={output}"], start_new_session=True, stderr=subprocess.DEVNULL)


def test_killed_at_any_time_the_census_repeats_nothing(tmp_path):
    output = tmp_path / "catalog"
    journal = output / "gymnasium.journal"
    process = _verify_library(output)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_nobody_is_left(process.pid)
    # What was found is marked, so that whatever is tried again would show; and the last line is torn.
    found = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    marked = {line["id"]: {**line, "steps_per_s": 123456.0 + i} for i, line in enumerate(found) if line["verified"]}
    lines = [json.dumps(marked.get(line["id"], line)) for line in found]
    journal.write_text("\n".join(lines) + "\n" + lines[0][:40])
    assert _verify_library(output).wait() == 0
    whole = {line.id: line for line in entries.read_entries(output / "gymnasium.jsonl")}
    # Asked in another process: in this one, other tests may have registered ids of their own.
    code = "from environments import registry; print(*registry.candidates('gymnasium'))"
    offered = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(whole) == {f"gymnasium/{name}" for name in offered}
    assert marked and all(whole[id].steps_per_s == line["steps_per_s"] for id, line in marked.items())
    assert not any(line.steps_per_s > 123455 for id, line in whole.items() if id not in marked)
    assert not journal.exists()
    # Once more, with nothing left to do: the file stays as it is.
    before = (output / "gymnasium.jsonl").read_bytes()
    assert _verify_library(output).wait() == 0
    assert (output / "gymnasium.jsonl").read_bytes() == before


def _wait_until_nobody_is_left(group):
    """The processes that try ids notice that theirs is gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("processes are left behind")


def test_what_failed_is_tried_again_when_asked_and_what_is_refused_today_is_refused(tmp_path):
    path = tmp_path / "gymnasium.jsonl"
    shutil.copy(entries.CATALOG / "gymnasium.jsonl", path)
    lines = entries.read_entries(path)
    broken = verification.entry("gymnasium/CartPole-v1", reason="it did not reset and step in time")
    refused = next(line for line in lines if line.name == "GymV21Environment-v0")
    allowed = dataclasses.replace(refused, verified=True, reason="")
    changed = {broken.id: broken, allowed.id: allowed}
    entries.write_entries(path, [changed.get(line.id, line) for line in lines])
    command = [sys.executable, "-m", "experiments.verify_catalog", "--libraries=gymnasium", "--workers=1", "--retry"]
    subprocess.run([*command, f"--output={tmp_path}"], check=True, stderr=subprocess.DEVNULL)
    after = {line.id: line for line in entries.read_entries(path)}
    assert after[broken.id].verified and set(after) == {line.id for line in lines}
    assert after[refused.id] == refused
    kept = [line for line in lines if line.verified and line.id != broken.id]
    assert all(after[line.id] == line for line in kept)


# How it is shown.


def test_the_page_in_the_docs_is_what_the_catalog_says():
    page = pathlib.Path(__file__).parents[1] / "docs" / "catalog.md"
    assert page.read_text("utf-8") == catalog_page.render_catalog(LINES), "make it again: --page=docs/catalog.md"
    assert f"{len(WORKS):,} ids verified" in page.read_text("utf-8")
