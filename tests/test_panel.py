"""The panel: what is drawn has every kind of space, one id a family, and nothing that is set aside."""

import collections

import pytest
from sources import ROOT

import environments
from experiments.draw_panel import draw_panel, kinds_of, render_list
from experiments.harness.ids import Choice, chosen_ids
from ldm_jax.errors import ConfigError

PANELS = ROOT / "experiments" / "panels"


@pytest.fixture(scope="module")
def small_catalog():
    return environments.select("library=gymnax,bsuite,popgym,gym-classics,jumanji")


def _listed(name):
    by_id = {entry.id: entry for entry in environments.find()}
    return [by_id[id] for id in chosen_ids(Choice(environments=f"@{PANELS / name}.txt"))]


def test_the_panel_is_as_broad_as_it_says_and_nothing_set_aside_is_trained_on():
    trained, aside = _listed("panel200"), _listed("panel200_held_out")
    families = collections.Counter(entry.family for entry in (*trained, *aside))
    assert families.most_common(1)[0][1] == 1, "one id a family, over both lists"
    assert (len(trained), len(aside)) == (320, 40)
    assert len({entry.library for entry in trained}) >= 25
    assert len({entry.domain for entry in trained}) >= 15
    assert any(entry.isolated for entry in trained)
    kinds = set().union(*(kinds_of(environments.spec(entry.id)) for entry in trained))
    parts = ("vector", "categorical", "grid", "image", "text", "nested")
    actions = ("Discrete", "MultiDiscrete", "MultiBinary", "Box", "Box and MultiDiscrete")
    assert kinds >= {*(f"observation {kind}" for kind in parts), *(f"action {kind}" for kind in actions)}


def test_a_draw_is_the_same_each_time_and_another_seed_draws_others(small_catalog):
    panel = draw_panel(small_catalog, 20, 5, 0)
    assert panel == draw_panel(reversed(small_catalog), 20, 5, 0)
    assert panel.entries != draw_panel(small_catalog, 20, 5, 1).entries
    families = [entry.family for entry in (*panel.entries, *panel.held_out)]
    assert len({*families}) == len(families) == 25


def test_libraries_are_drawn_from_alike_whatever_their_size(small_catalog):
    panel = draw_panel(small_catalog, 20, 5, 0)
    drawn = collections.Counter(entry.library for entry in (*panel.entries, *panel.held_out))
    assert set(drawn) == {entry.library for entry in small_catalog}
    assert max(drawn.values()) <= 25 // len(drawn) + len(set().union(*map(_kinds, small_catalog)))


def _kinds(entry):
    return kinds_of(environments.spec(entry.id))


def test_a_list_says_its_rule_and_reads_back(small_catalog, tmp_path):
    panel = draw_panel(small_catalog, 20, 5, 0)
    path = tmp_path / "panel.txt"
    path.write_text(render_list(panel, panel.entries, "Trained on."))
    assert {*chosen_ids(Choice(environments=f"@{path}"))} == {entry.id for entry in panel.entries}


def test_more_tasks_than_families_are_refused(small_catalog):
    with pytest.raises(ConfigError, match=r"9999 tasks and 5 held out are wanted: there are \d+ families"):
        draw_panel(small_catalog, 9999, 5, 0)
