"""Laws of the pages: they say what was found, run nothing of others, ask no network, and stay quick with thousands."""

import dataclasses
import html.parser
import json
import math
import re

import browsing
import gymnasium
import jax
import numpy as np
import pytest

import environments
from environments.catalog import entries
from experiments.report import data_card, document, page, provenance, rollouts, runs, targets
from ldm_jax import rollout
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
# An id, a domain or a reason comes from a library: what looks like HTML in it is text.
HOSTILE = 'x/</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'


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
    details = {"Training": {"seed": 0, "length": "1,200 steps"}}
    return page.write_report(directory, page.FinishedRun("quickstart", evaluation(), metrics(), provenance=details))


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
    assert not re.search(r"url\((?!#)|@import|<script[^>]* src|<link", text)
    # And a browser is told to fetch nothing and to run only what was put in.
    assert re.search(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src( 'sha256-[^']+'){2,}\"", text
    )
    assert len(text) < 300_000


def test_the_page_names_every_environment_and_always_admitted_of_registered(report):
    text = Tags(report.read_text()).text
    assert all(item["id"] in text for item in evaluation()["environments"])
    assert "13 admitted of 15 registered" in text
    assert 'refused: the simulator said "no" & died' in text
    assert "greedy" in text and "943,104" in text and "1,200 steps" in text


def test_writing_again_replaces_the_files_with_the_same_bytes(report, tmp_path):
    first = page.write_report(tmp_path, page.FinishedRun("A", evaluation(), metrics()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    page.write_report(tmp_path, page.FinishedRun("A", evaluation(), metrics()))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert first.exists()


def test_nothing_admitted_and_no_training_still_make_a_page():
    refused = scores.score(scores.Measurement("gymnax/A", "games", np.zeros(4), np.zeros(4), None), seed=0)
    text = page.render_report([page.FinishedRun("Empty", aggregates.scores_json([refused], 1, "greedy", seed=0))])
    assert "0 admitted of 1 registered" in text and "No training metrics" in text and Tags(text).open == []


def test_a_score_that_is_not_a_number_is_refused_before_anything_is_written(tmp_path):
    found = evaluation()
    found["environments"][0]["model"] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        page.write_report(tmp_path / "report", page.FinishedRun("A", found))
    assert not (tmp_path / "report").exists()


# Runs in their folders

DOMAINS = [f"domain {letter}" for letter in "abcdefghij"]
SMALL = [id for id, *_ in ENVIRONMENTS[:9]]


def lay_out(folder, count, seed, ids=()):
    """A finished run of many made-up environments, as its stages leave it behind; the last one's names are hostile."""
    rng = np.random.default_rng(seed)
    named = [*ids, *(f"library{i % 40}/Environment-{i:04}-v0" for i in range(count - len(ids) - 1)), HOSTILE]
    found = []
    for i, id in enumerate(named):
        domain = HOSTILE if id == HOSTILE else DOMAINS[(i + i // 40) % len(DOMAINS)]
        z = 1 - abs(rng.normal(0, 0.3)) ** 1.5 + 0.02 * np.arange(4)
        returns = [rng.normal(0, 1, (4, 4)), rng.normal(100, 2, (4, 4)), rng.normal(100 * z, 3, (6, 4))]
        missing = f"worker {i} of {HOSTILE} died" if i % 12 == 7 and id != HOSTILE else ""
        parts = [None] * 3 if missing else returns
        found.append(scores.Measurement(id, domain, *parts, 120.0 if i % 9 == 0 else None, missing))
    told = aggregates.scores_json(scores.score_each(found, seed=0, resamples=50), 86_000_000, "card", seed=0)
    (folder / "report" / "rollouts").mkdir(parents=True)
    (folder / "report" / "scores.json").write_text(json.dumps(told))
    (folder / "report" / "provenance.json").write_text(json.dumps({"Code": {"Commit": HOSTILE}}))
    rows = [
        {"step": s, "tokens": s * 1000, "loss": 1 + 1 / s, "kl": 1 / s, "kl_by_domain": dict.fromkeys(DOMAINS, 2 / s)}
        for s in range(1, 400)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for item in told["environments"][:60]:
        place = folder / "references" / item["id"]
        place.mkdir(parents=True)
        curve = [[step, 100 * step / 9 + rng.normal(0, 9)] for step in range(10)]
        (place / "reference.json").write_text(json.dumps({"reference": {"curve": curve}}))
    spaces = (
        gymnasium.spaces.Box(0, 255, (84, 84, 3), np.uint8),
        gymnasium.spaces.Box(0, 1, (10, 10, 4), np.float32),
        gymnasium.spaces.Discrete(48),
        gymnasium.spaces.Box(-1, 1, (6,), np.float32),
    )
    for space, id in zip(spaces, [item["id"] for item in told["environments"] if item["z"] is not None], strict=False):
        drawn = rollouts.draw_compact(space, [space.sample() for _ in range(60)])
        path = folder / "report" / "rollouts" / f"{id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": id, "rewards": [0.5] * 60, "first": [True] + [False] * 59, **drawn}))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("large") / "large", 2000, seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("other") / "other", 40, seed=1, ids=SMALL)


@pytest.mark.parametrize("folders", [[], ["missing"], ["damaged"]])
def test_a_page_of_what_is_no_run_says_how_to_make_one(tmp_path, folders):
    (tmp_path / "damaged" / "report").mkdir(parents=True)
    (tmp_path / "damaged" / "report" / "scores.json").write_text("{")
    with pytest.raises(runs.ReportError, match=r"runs/quickstart|experiments\.evaluate --workdir"):
        runs.report_runs([tmp_path / folder for folder in folders], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_of_two_thousand_environments_stays_small(large, tmp_path):
    path = runs.report_runs([large], tmp_path / "large.html")
    assert path.stat().st_size < 5_000_000
    assert "2000 registered" in path.read_text()


def test_nothing_of_another_s_text_can_end_the_element_that_it_stands_in(tmp_path):
    for text in (HOSTILE, "</ScRiPt ", "<!--<script>", "\u2028"):
        found = document.embed({text: [text]})
        assert not re.search("[<>\u2028]", found) and json.loads(found) == {text: [text]}


def test_provenance_tells_what_a_run_was_made_of_and_nobody_s_folders(tmp_path):
    configuration = {"weights": "/srv/somebody/secret/weights.json", "data": ["s3://bucket/mine/dataset"], "seed": 3}
    (tmp_path / "pretrain.json").write_text(json.dumps(configuration))
    told = provenance.provenance(tmp_path)
    assert told["Configuration"] == {"pretrain": {"weights": "…/weights.json", "data": ["…/dataset"], "seed": 3}}
    assert told["Versions"]["jax"] == jax.__version__ and told["Machine"]["Devices"] and told["Code"]["Commit"]
    assert not re.search(rf"somebody|bucket|{re.escape(str(tmp_path))}", json.dumps(told))


# In a browser


@pytest.fixture(scope="module")
def browser():
    with browsing.chromium() as found:
        yield found


def card_page(path, count):
    """The data card of made-up environments; one has no episode, one no span between random and reference."""
    rng, named = (
        np.random.default_rng(0),
        [HOSTILE, *(f"library{i % 40}/Environment-{i:04}-v0" for i in range(1, count))],
    )
    rows = [
        data_card.CardRow(
            id=id,
            domain=DOMAINS[i % 10],
            transitions=1000 * (i + 1),
            raw=40_000 * (i + 1),
            stored=9000 * (i + 1),
            random=0.0,
            reference=0.0 if i == 1 else 100.0,
            returns=np.zeros(0) if i == 2 else rng.normal(60, 20, 30),
            noise=np.zeros(0, np.float32) if i == 2 else np.linspace(0, 1, 30, dtype=np.float32),
            labels=1.0,
            by="ppo greedy",
        )
        for i, id in enumerate(named)
    ]
    refused = {"faults": [(HOSTILE, f"it raised {HOSTILE}")]}
    path.write_text(data_card.render_data_card(HOSTILE, rows, refused, {"Digest": "0" * 32}))
    return path


def test_a_data_card_of_five_thousand_environments_stays_small_and_runs_nothing_of_others(browser, tmp_path):
    path = card_page(tmp_path / "card.html", 5000)
    assert path.stat().st_size < 5_000_000
    assert browser.open(path) < 2
    assert browser.errors() == [] and browser.run("return window.hacked === undefined")
    assert browser.texts(".told")[0] == "1 to 50 of 5,000" and len(browser.texts(".group .name")) == 10
    browser.one(".group .name").click()
    assert browser.texts(".told")[0] == "1 to 50 of 500 found among 5,000"


def rows_shown(browser):
    return browser.texts("tbody tr th .id")


def test_a_large_page_opens_with_little_work_without_an_error_and_runs_nothing_of_others(browser, large, tmp_path):
    path = runs.report_runs([large], tmp_path / "large.html")
    seconds = browser.open(path)
    assert browser.errors() == [] and browser.run("return window.hacked === undefined")
    assert seconds < 2  # of the processor, so that what else a machine does is not counted
    assert len(rows_shown(browser)) == 50 and browser.texts(".told")[0] == "1 to 50 of 2,000"
    assert len(browser.texts(".group .name")) == 10 + 1 + 40 + 1
    assert browser.run("return document.querySelectorAll('.rollouts canvas').length") == 4
    browser.keep("report-2000-1440-light")


def test_the_table_sorts_filters_searches_turns_and_opens_by_keyboard_too(browser, large, tmp_path):
    from selenium.webdriver.common.keys import Keys

    browser.open(runs.report_runs([large], tmp_path / "large.html"))
    found = {item["id"]: item for item in json.loads((large / "report" / "scores.json").read_text())["environments"]}
    shown = rows_shown(browser)
    ranked = sorted((float(f"{item['z']:.4g}") for item in found.values() if item["z"]), reverse=True)
    assert [float(f"{found[id]['z']:.4g}") for id in shown] == ranked[:50]
    for button in browser.all("thead button"):
        if button.text == "Environment":
            button.send_keys(Keys.ENTER)
    assert rows_shown(browser) == sorted(found, key=lambda id: id.lower())[:50]
    browser.one("[data-turn=on]").send_keys(Keys.ENTER)
    assert browser.texts(".told")[0] == "51 to 100 of 2,000"
    browser.one("input[type=search]").send_keys("environment-1 library1/")
    browser.run("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    expected = {id for id in found if "Environment-1" in id and id.startswith("library1/")}
    assert {*rows_shown(browser)} == expected and expected
    browser.run("document.querySelector('[data-filter=outcome]').focus()")
    browser.one("[data-filter=outcome]").send_keys("Refused")
    assert {*rows_shown(browser)} == {id for id in expected if found[id]["z"] is None}
    browser.one(".controls .quiet").send_keys(Keys.ENTER)
    browser.one("[data-filter=domain]").send_keys(DOMAINS[3])
    assert all(found[id]["domain"] == DOMAINS[3] for id in rows_shown(browser))
    browser.one("tbody .open").send_keys(Keys.ENTER)
    assert any("By episode" in text or "Refused" in text for text in browser.texts(".opened"))
    assert browser.errors() == []


@pytest.mark.parametrize("width", [browsing.WIDE, browsing.NARROW])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_its_window_and_follows_the_theme_which_a_button_turns(
    browser, report, other, tmp_path, width, scheme
):
    pages = {"report": report, "report-2": runs.report_runs([other, other], tmp_path / "two.html")}
    pages["data-card"] = card_page(tmp_path / "card.html", 60)
    for name, path in pages.items():
        browser.open(path, width, scheme)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        paper = "return getComputedStyle(document.body).backgroundColor"
        pixels = "return document.querySelector('.plot canvas').toDataURL()"
        before, drawn = browser.run(paper), browser.run(pixels)
        assert (sum(map(int, re.findall(r"\d+", before)[:3])) > 600) == (scheme == "light")
        browser.keep(f"{name}-{width}-{scheme}", width)
        for _ in range(1 if scheme == "dark" else 2):  # as the system, light, dark
            browser.run("document.getElementById('theme').click()")
        assert browser.run(paper) != before and browser.run(pixels) != drawn
        assert browser.errors() == []


def test_runs_side_by_side_show_differences_and_what_only_one_has(browser, large, other, tmp_path):
    browser.open(runs.report_runs([large, other], tmp_path / "two.html"))
    assert browser.errors() == [] and browser.run("return window.hacked === undefined")
    shown = dict(zip(browser.texts(".differences dt"), browser.texts(".differences dd"), strict=True))
    first, second = (json.loads((run / "report" / "scores.json").read_text()) for run in (large, other))
    assert shown["interquartile mean"] == f"{second['iqm']['value'] - first['iqm']['value']:+.3f}"
    assert shown["only in one"] == f"{2000 - 31} + 9"
    browser.one("[data-filter=outcome]").send_keys("Only in other")
    assert sorted(rows_shown(browser)) == sorted(SMALL)
    browser.keep("report-side-by-side-1440-light")


# Rollouts


def test_what_is_recorded_changes_nothing_and_is_small(tmp_path):
    inside = environments.make("gymnax/CartPole-v1", batch_size=3)
    recorder = rollouts.Recorder(environments.make("gymnax/CartPole-v1", batch_size=3), steps=5)
    state, timestep = rollout.reset_from_host(inside, jax.random.key(0))
    told, seen = rollout.reset_from_host(recorder, jax.random.key(0))
    for _ in range(8):
        jax.tree.map(np.testing.assert_array_equal, timestep, seen)
        action = np.ones(3, np.int32)
        state, timestep = rollout.step_from_host(inside, state, action)
        told, seen = rollout.step_from_host(recorder, told, action)
    recorder.write(tmp_path / "a" / "b.json")
    found = json.loads((tmp_path / "a" / "b.json").read_text())
    assert found["kind"] == "lines" and len(found["rewards"]) == len(found["first"]) == 5
    assert recorder.spec == dataclasses.replace(inside.spec, jittable=False)


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Box(0, 255, (210, 160, 3), np.uint8),
        gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gymnasium.spaces.Box(0, 1, (10, 10, 4), np.float32),
        gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 10, (7, 7, 3), np.uint8), speed=gymnasium.spaces.Discrete(4)
        ),
        gymnasium.spaces.Discrete(500, start=3),
        gymnasium.spaces.Box(-np.inf, np.inf, (376,), np.float64),
        gymnasium.spaces.MultiDiscrete([3, 4]),
    ],
    ids=str,
)
def test_whatever_is_observed_is_drawn_within_its_budget(space):
    space.seed(0)
    seen = [space.sample() for _ in range(rollouts.RECORDED_STEPS)]
    assert len(json.dumps(rollouts.draw_compact(space, seen), allow_nan=False)) < 400_000
    frames = rollouts.draw_frames(space, seen[:6])
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[0] == 6 and frames.shape[3] == 3
    assert not frames.shape[1] % 2 and not frames.shape[2] % 2 and frames.std() > 0


def test_text_alone_is_said_to_be_nothing_to_draw():
    with pytest.raises(rollouts.NothingToDrawError, match="without a number or a picture"):
        rollouts.draw_frames(gymnasium.spaces.Text(5), ["a", "b"])


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
