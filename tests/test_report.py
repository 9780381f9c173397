import html.parser
import json
import math
import re

import numpy as np
import pytest

from environments.catalog import entries
from experiments.report import page, targets
from ldm_jax.evaluation import aggregates, scores

# id, domain, random, reference, spread of one episode, z, public target
ENVIRONMENTS = [
    ("gymnax/CartPole-v1", "classic control", 22, 500, 8, 1.0, 500),
    ("gymnax/Acrobot-v1", "classic control", -499, -80, 14, 1.0, -73.5),
    ("gymnax/Pendulum-v1", "classic control", -1240, -165, 90, 0.98, -152),
    ("gymnax/MountainCarContinuous-v0", "classic control", -33, 92, 1, 1.0, 94.7),
    ("gymnax/Catch-bsuite", "games", -0.63, 1, 0.2, 1.0, None),
    ("gymnax/Breakout-MinAtar", "games", 0.35, 21.1, 9, 1.01, None),
    ("gymnax/Reacher-misc", "robotics", 19.6, 41.9, 6, 0.68, None),
    ("gymnax/PointRobot-misc", "meta-learning", 0.13, 4.2, 2, 1.08, None),
    ("envpool/FrozenLake-v1", "toy text", 0.006, 0.76, 0.43, 0.95, 0.74),
    ("envpool/Taxi-v3", "toy text", -770, 8, 2.5, 0.999, 8.46),
    ("envpool/CliffWalking-v1", "toy text", -2069, -13, 0, 1.0, None),
    ("envpool/LunarLander-v3", "box2d", -188, 187, 95, 0.86, 242),
    ("envpool/MiniGrid-Empty-5x5-v0", "navigation", 0.21, 0.955, 0.02, 1.0, None),
    ("envpool/Hopeless-v0", "games", -21, -20.99, 1, 0, 21),
]


def evaluation():
    found = []
    for i, (id, domain, random, reference, spread, z, target) in enumerate(ENVIRONMENTS):
        rng, shape = np.random.default_rng(i), (32, 4)
        means = (random, reference, random + z * (reference - random))
        returns = [rng.normal(mean, spread, shape) for mean in means]
        found.append(scores.Measurement(id, domain, *returns, target))
    crashed = ("envpool/<Crashed>-v0", "games", None, None, None, None, 'the simulator said "no" & died')
    found = scores.score_each([*found, scores.Measurement(*crashed)], seed=0, resamples=500)
    return aggregates.scores_json(found, parameters=943_104, decoding="greedy", seed=0)


def metrics():
    rng = np.random.default_rng(0)
    steps = np.arange(0, 1201, 2)
    excess = 1.6 * np.exp(-steps / 180) + 0.035 + rng.normal(0, 0.012, len(steps)) * np.exp(-steps / 900)
    rows = [
        {"step": int(s), "tokens": int(s) * 3328, "loss": e + 0.31, "kl": e} for s, e in zip(steps, excess, strict=True)
    ]
    return [*rows, {"step": 1202, "tokens": 4_000_256, "loss": math.nan, "grad_norm": 1.0}]


class Tags(html.parser.HTMLParser):
    """The open tags of a page, checked to be closed in order, and all its text and addresses."""

    void = ("meta", "br", "img", "link", "path", "use", "line", "circle", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.addresses = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "report"
    details = {"seed": 0, "training": "1,200 steps"}
    return page.write_report(directory, evaluation(), metrics(), "ldm_jax quickstart", details)


def test_the_folder_holds_the_scores_the_picture_and_the_page_and_nothing_half_written(report):
    assert report.name == "index.html"
    assert sorted(path.name for path in report.parent.iterdir()) == ["curve.png", "index.html", "scores.json"]
    assert json.loads((report.parent / "scores.json").read_text()) == evaluation()
    assert (report.parent / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_page_is_well_formed_and_needs_no_network(report):
    text = report.read_text()
    tags = Tags(text)
    assert tags.open == []
    # Only places inside the page itself are referred to.
    assert all(address.startswith(("#", "data:")) for address in tags.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert len(text) < 300_000


def test_the_page_names_every_environment_and_always_admitted_of_registered(report):
    text = Tags(report.read_text()).text
    assert all(item["id"] in text for item in evaluation()["environments"])
    assert "13 admitted of 15 registered" in text
    assert 'refused: the simulator said "no" & died' in text
    assert "greedy" in text and "943,104" in text and "1,200 steps" in text


def test_the_pictures_follow_the_theme(report):
    figures = re.findall(r'<svg class="figure".*?</svg>', report.read_text(), flags=re.DOTALL)
    assert len(figures) == 2
    assert all("var(--ink)" in figure and "#1b1f27" not in figure for figure in figures)


def test_writing_again_replaces_the_files_with_the_same_bytes(report, tmp_path):
    first = page.write_report(tmp_path, evaluation(), metrics(), "A", {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    page.write_report(tmp_path, evaluation(), metrics(), "A", {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert first.exists()


def test_nothing_admitted_and_no_training_still_make_a_page():
    refused = scores.score(scores.Measurement("gymnax/A", "games", np.zeros(4), np.zeros(4), None), seed=0)
    text = page.render_report(aggregates.scores_json([refused], 1, "greedy", seed=0), [], "Empty")
    assert "0 admitted of 1 registered" in text and "No training metrics" in text and Tags(text).open == []


def test_a_score_that_is_not_a_number_is_refused_before_anything_is_written(tmp_path):
    found = evaluation()
    found["environments"][0]["model"] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        page.write_report(tmp_path / "report", found, [], "A")
    assert not (tmp_path / "report").exists()


# Public targets


def test_every_public_target_is_a_number_with_a_source_for_a_task_of_the_catalog():
    listed = {entry.id for entry in entries.entries_of(entries.catalogued())}
    found = targets.read_targets()
    assert len(found) > 200 and len({target.id for target in found}) == len(found)
    for target in found:
        assert target.target is None or math.isfinite(target.target)
        assert target.source and target.confidence in ("high", "medium", "low", "bound")
        assert target.metric.startswith(("return", "success_rate"))
        assert target.listed == (target.id in listed), target.id
        assert {*target.aliases} <= listed, target.id


def test_a_target_is_found_by_id_alias_and_task_and_compared_only_where_it_is_a_return():
    assert targets.find_target("gymnax/CartPole-v1") == targets.find_target("gymnasium/CartPole-v1")
    assert targets.find_target("envpool/LunarLander-v2").target_return == 242.1
    assert targets.find_target("gymnasium/Nothing-v0") is None
    rate = next(target for target in targets.read_targets() if target.metric == "success_rate")
    assert targets.find_target(rate.id) == rate and rate.target_return is None
