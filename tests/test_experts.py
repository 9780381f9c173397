"""Laws of references that are experts: who acts, what is labelled, what is masked, and when one is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import CASES, reference_of

import environments
from data import references
from data.collect import CollectConfig, collect
from data.distil import DistilConfig, distil, score_distilled
from data.references.choosing import choose_reference
from data.references.expert import LEARNABLE, ExpertConfig, check_learnable, expert_policy
from data.references.pipeline import opened_for
from environments.catalog.experts import ExpertError, ExpertInfo
from experiments import experts_table
from experiments import references as references_stage
from experiments.harness import experts, outcomes
from experiments.harness.stage import UnitsFailedError
from experiments.references import ReferencesConfig
from ldm_jax import rollout
from ldm_jax.cards import CardError, EnvironmentCard, Reference, Returns
from ldm_jax.encoding.codec import Codec
from ldm_jax.environment import EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation import scores
from ldm_jax.model.network import Inputs
from ldm_jax.training.loss import select_labels
from ldm_jax.types import ExpertLabel, TimeStep

ID = "gymnax/CartPole-v1"
STREAMS, STEPS = 12, 120
CONFIG = CollectConfig(streams=STREAMS, steps=STEPS, block=60)


@dataclasses.dataclass(frozen=True, eq=False)
class _Told:
    """CartPole with an expert beside it, which is silent where the cart is on the right of `silent_from`."""

    inner: object
    silent_from: float

    @property
    def spec(self):
        return self.inner.spec

    def _tell(self, state, timestep: TimeStep):
        action, _ = CASES[ID](timestep.observation)
        valid = (timestep.observation[:, 0] < self.silent_from) & ~timestep.last
        # What a silent expert leaves in its place is anything.
        return state, timestep._replace(expert=ExpertLabel(jnp.where(valid, action, 77), valid))

    def reset(self, key):
        return self._tell(*self.inner.reset(key))

    def step(self, state, action):
        return self._tell(*self.inner.step(state, action))

    def close(self):
        self.inner.close()


def make(id, batch_size=1, expert="", silent_from=np.inf):
    inner = environments.make(id, batch_size)
    return _Told(inner, silent_from) if expert else inner


def told(silent_from=np.inf):
    return functools.partial(make, silent_from=silent_from)


def expert_of(spec, **changes):
    return expert_policy(spec, ExpertConfig("push", "1", **changes))


@pytest.fixture(scope="module")
def spec():
    return environments.spec(ID)


@pytest.fixture(scope="module")
def silent(spec):
    """What was collected of an expert that is silent on one side."""
    with opened_for(told(0.0), expert_of(spec), STREAMS) as environment:
        return collect(environment, expert_of(spec), 3, CONFIG)


def test_an_expert_acts_as_it_is_told_and_is_scored_like_any_reference(spec):
    policy = references.train_reference(told(), ID, references.Recipe("expert", ExpertConfig("push", "1")))
    assert policy == expert_of(spec) and policy.reference.budget_steps == 0
    scored = references.score_reference(told(), policy, num_envs=16, episodes_per_env=2)
    with opened_for(told(), policy, 16) as environment:
        scripted = reference_of(CASES[ID], environment)
        key = jax.random.key(4)
        one, other = (
            rollout.run_episodes(environment, each.agent, each.params, key, 1).returns for each in (policy, scripted)
        )
    np.testing.assert_array_equal(one, other)
    assert scored.admission.admitted and scored.policy.reference.decoding == "greedy"
    assert scored.reference_returns.mean > 100 > 40 > scored.random_returns.mean


def test_an_expert_is_saved_by_name_and_version_without_weights(spec, tmp_path):
    returns = [Returns.of(np.full((2, 2), value) + np.eye(2)) for value in (1.0, 9.0, 6.0)]
    scored = references.ScoredReference(expert_of(spec, privileged=True, labels_any_state=False), *returns)
    references.save_reference(tmp_path / "one", scored)
    assert references.load_reference(tmp_path / "one") == scored
    description = json.loads((tmp_path / "one" / "reference.json").read_text())
    assert description["reference"]["expert"] == "push" and description["reference"]["expert_version"] == "1"
    assert description["params"]["policy"] == {}, "there is nothing to weigh"


def test_a_step_without_an_answer_is_random_masked_and_counted(silent):
    leaves = silent.leaves
    ends, spoke = leaves["terminated"] | leaves["truncated"], leaves["observation/value"][..., 0] < 0
    np.testing.assert_array_equal(leaves["label_mask"], spoke & ~ends)
    assert silent.statistics.unlabelled == (~spoke & ~ends).sum() > 0
    first_stream = leaves["label_mask"][:, 0], leaves["action/value"][:, 0], leaves["reference_action/value"][:, 0]
    mask, executed, label = first_stream
    assert (executed == label)[mask].all(), "the first stream executes the expert's answers"
    assert {*executed[~mask]} == {0, 1}, "and acts at random where it has none"
    assert leaves["reference_action/value"].max() <= 1, "what is no answer is not stored"
    expected, _ = CASES[ID](jnp.asarray(leaves["observation/value"]).reshape(-1, 4))
    everywhere = np.asarray(expected).reshape(STEPS, STREAMS)
    np.testing.assert_array_equal(
        leaves["reference_action/value"][leaves["label_mask"]], everywhere[leaves["label_mask"]]
    )
    assert silent.random > 0.5 and not any(name.startswith("reference/") for name in leaves)


def test_what_stands_where_there_is_no_label_changes_nothing_that_is_learned(spec, silent):
    zeros = Returns.of(np.zeros((2, 2)))
    card = EnvironmentCard.of(
        spec,
        statistics=silent.statistics,
        random_returns=zeros,
        reference_returns=zeros,
        reference=Reference("expert", "greedy", 0, 0, expert="push"),
    )
    assert EnvironmentCard.from_json(json.loads(json.dumps(card.to_json()))) == card
    codec, found = Codec(card), []
    for flip in (False, True):
        leaves = dict(silent.leaves)
        label, mask = leaves["reference_action/value"], leaves["label_mask"]
        leaves["reference_action/value"] = np.where(mask | (not flip), label, 1 - label)
        features, targets = codec.window({name: value[:, 0] for name, value in leaves.items()})
        signature = jax.tree.map(lambda x: np.asarray(x)[None], codec.signature)
        inputs = Inputs(jax.tree.map(lambda x: np.asarray(x)[None], features), signature)
        found.append((features, select_labels(inputs, jax.tree.map(lambda x: np.asarray(x)[None], targets))))
    assert (silent.leaves["label_mask"][:, 0] == 0).any()
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_an_expert_that_cannot_label_any_state_is_only_replayed(spec):
    policy = expert_of(spec, labels_any_state=False)
    with opened_for(told(), policy, STREAMS) as environment:
        collected = collect(environment, policy, 3, CONFIG)
    mask = collected.leaves["label_mask"]
    executed, label = (collected.leaves[f"{name}/value"] for name in ("action", "reference_action"))
    assert collected.random == 0 and collected.agreement == 1 and (executed == label)[mask].all()
    assert (collected.episodes.noise == 0).all()


def test_an_environment_made_without_its_expert_is_refused(spec):
    with pytest.raises(EnvironmentFaultError, match="expert=<name>"):
        collect(environments.make(ID, 2), expert_of(spec), 0, CollectConfig(2, 4, 4))


@pytest.mark.parametrize(("config", "message"), [({"name": ""}, "no name"), ({"name": "a", "budget_steps": 3}, "is 3")])
def test_experts_that_contradict_themselves_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        ExpertConfig(**config)


@pytest.mark.parametrize(("distilled", "admitted"), [(None, False), (0.4, False), (0.6, True), (1.0, True)])
def test_a_privileged_expert_is_admitted_where_a_policy_on_observations_keeps_half(distilled, admitted):
    random, reference = np.array([[0.0, 1.0]] * 8), np.array([[10.0, 11.0]] * 8)
    admission = scores.admit(random, reference)
    assert admission.admitted and LEARNABLE == 0.5
    kept = distilled and Returns.of(np.full((2, 2), random.mean() + distilled * 10.0))
    found = check_learnable(admission, Returns.of(random), kept)
    assert found.admitted == admitted and "privileged" in found.reason
    refused = scores.admit(reference, random)
    assert check_learnable(refused, Returns.of(random), kept) == refused, "what is not better needs no other reason"


def test_a_policy_is_distilled_from_labels_and_sees_observations_alone(spec):
    policy = expert_of(spec, privileged=True)
    random = Returns.of(np.full((8, 2), 20.0) + np.eye(8, 2))
    scored = references.ScoredReference(policy, random, Returns.of(np.full((8, 2), 400.0) + np.eye(8, 2)))
    assert not scored.admission.admitted
    returns = score_distilled(told(), scored, 0, DistilConfig(streams=16, steps=128, updates=300))
    assert returns.array.shape == (8, 2) and returns.mean > 210
    assert dataclasses.replace(scored, distilled_returns=returns).admission.admitted


def test_nothing_is_distilled_from_no_label(spec):
    with pytest.raises(references.ReferencePolicyError, match="labelled none"):
        distil(told(-np.inf), expert_of(spec), 0, DistilConfig(streams=2, steps=4))


def test_the_best_of_several_references_is_chosen_by_episodes_of_its_own(spec):
    def either(id, batch_size=1, expert=""):
        return make(id, batch_size, expert, np.inf if expert == "push" else -np.inf)

    good, bad = (expert_policy(spec, ExpertConfig(name)) for name in ("push", "silent"))
    assert choose_reference(either, [bad, good], num_envs=8) == good
    assert choose_reference(either, [bad], num_envs=8) == bad, "there is nothing to play for"
    with pytest.raises(ConfigError, match="expected at least one"):
        choose_reference(either, [])


def test_an_expert_that_fails_is_left_out_and_the_others_go_on(spec, caplog):
    def breaking(id, batch_size=1, expert=""):
        if expert == "broken":
            raise EnvironmentFaultError("it raised ImportError")
        return make(id, batch_size, expert)

    good, broken = (expert_policy(spec, ExpertConfig(name)) for name in ("push", "broken"))
    assert choose_reference(breaking, [broken, good], num_envs=8) == good
    assert "its expert broken is left out: it raised ImportError" in caplog.text
    with pytest.raises(EnvironmentFaultError, match="ImportError"):
        choose_reference(breaking, [broken, broken], num_envs=8)


def test_experts_are_watched_while_they_are_scored(spec, monkeypatch):
    watch = experts.Watch(told())
    monkeypatch.setitem(experts._SUCCESS, ID, ("ended", 0.5))
    with contextlib.closing(watch(ID, 4, "push")) as environment:
        state, _ = environment.reset(jax.random.key(0))
        for _ in range(200):  # always to one side: the pole falls, once and again, and the first time counts
            state, _ = environment.step(state, np.zeros(4, np.int32))
        assert len(np.concatenate(environment.episodes["ended"])) == 4
    assert watch.facts("push") == {"success": 1.0} and watch.facts("another") == {}


def test_a_newsvendor_orders_the_critical_share_of_the_demand():
    from scipy import stats

    from environments.bridges.experts.inventory import _best_order

    for price, cost, holding, penalty, mean in ((50.0, 20.0, 2.0, 5.0, 80.0), (10.0, 9.0, 1.0, 0.5, 30.0)):
        best = stats.poisson(mean).ppf((price + penalty - cost) / (price + penalty + holding))
        assert _best_order(price, cost, holding, penalty, mean, pays_by_excess=False) == best
        assert _best_order(price, cost, holding, penalty, mean, pays_by_excess=True) < mean, (
            "what is left over costs more there"
        )


def test_the_table_of_experts_says_what_each_returns_and_why_one_is_refused(spec, tmp_path, monkeypatch):
    infos = {
        name: ExpertInfo(name, "1", "live", name == "b", True, name == "a", "m", (f"lib/{name}",)) for name in "abc"
    }
    monkeypatch.setattr(environments, "experts", lambda id: (infos[id[-1]],))
    returns = [Returns.of(np.full((2, 2), value) + np.eye(2)) for value in (1.0, 9.0, 2.0)]
    for name, privileged in (("a", False), ("b", True)):
        config = ExpertConfig(name, "1", privileged)
        scored = references.ScoredReference(expert_policy(spec, config), *returns)
        references.save_reference(tmp_path / "lib" / name, scored)
        verdict = "admitted" if scored.admission.admitted else "refused"
        outcomes.write_outcome(tmp_path / "lib" / name, outcomes.UnitOutcome(verdict, scored.admission.reason))
    experts.write_facts(tmp_path / "lib/a", {"label_seconds": 0.002, "success": 0.75})
    page = experts_table.render_experts(experts_table.find_rows(tmp_path, ["lib/a", "lib/b", "lib/c"]))
    assert "**1 ids admitted**, 1 of them" in page and "| lib | 3 | 2 | 1 | 1 | 0 |" in page
    lines = {line.split(" | ")[0][2:]: line for line in page.splitlines() if line.startswith("| lib/")}
    assert "| a | library | 9.5 ± 0.29 | 1.5 ± 0.29 | 4 | 0.75 | 500 |  |" in lines["lib/a"]
    assert "ours" in lines["lib/b"] and "refused: privileged" in lines["lib/b"] and "lib/c" not in lines


def test_an_expert_of_another_version_is_another_expert():
    info = environments.experts("minigrid/BabyAI-GoToLocal-v0")[0]
    same = Reference("expert", "greedy", 0, 0, expert=info.name, expert_version=info.version)
    experts.check_same_expert("minigrid/BabyAI-GoToLocal-v0", same)
    with pytest.raises(CardError, match="make its reference anew"):
        experts.check_same_expert("minigrid/BabyAI-GoToLocal-v0", dataclasses.replace(same, expert_version="0"))
    with pytest.raises(ExpertError, match="no expert"):
        experts.check_same_expert("minigrid/BabyAI-GoToLocal-v0", dataclasses.replace(same, expert="nobody"))


# Experts that are functions of the observation


def test_what_a_library_ships_for_one_simulator_lands_in_another():
    id = "envpool/LunarLanderContinuous-v3"
    with (
        contextlib.closing(environments.make(id, 4)) as plain,
        contextlib.closing(environments.make(id, 4, expert="lander-heuristic")) as told,
    ):
        policy = expert_policy(told.spec, ExpertConfig("lander-heuristic"))
        returns = rollout.run_episodes(told, policy.agent, policy.params, jax.random.key(0), 1).returns
        assert returns.mean() > 150
        report = told.expert_report
        assert report.counts["labels"] == report.counts["asked"] > 100 and not report.notes
        runs, random = [], references.random_agent(told.spec.action_space)
        for environment in (told, plain):  # the same keys, with labels and without
            loop = rollout.start(environment, random, jax.random.key(1))
            _, run = rollout.rollout(environment, random, (), loop, jax.random.key(2), 40)
            runs.append(run._replace(timestep=run.timestep._replace(expert=None)))
        jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="Meta-World's policies are not installed")
def test_meta_worlds_policies_reach_the_goal_that_envpool_shows():
    with contextlib.closing(environments.make("envpool/MetaWorld/Reach-v3", 4, expert="scripted-policy")) as told:
        policy = expert_policy(told.spec, ExpertConfig("scripted-policy"))
        loop = rollout.start(told, policy.agent, jax.random.key(0))
        _, run = rollout.rollout(told, policy.agent, policy.params, loop, jax.random.key(1), 100)
        goals = run.timestep.observation[0, :, -3:]
        assert (goals != 0).all() and len(np.unique(goals[:, 0])) == 4, "shown, and of each row its own"
        assert (run.timestep.reward[-1] > 9.9).all(), "10 is what Meta-World pays where a task is solved"


def test_the_stage_takes_experts_alone_and_says_of_an_id_that_it_has_none(tmp_path):
    id, none = "envpool/LunarLanderContinuous-v3", "gymnax/Catch-bsuite"
    config = ReferencesConfig(algorithms="expert", num_envs=8, least_episodes=8, most_episodes=16, workers=0)
    with pytest.raises(UnitsFailedError, match="has no expert"):
        references_stage.run(config, tmp_path, (id, none))
    scored = references.load_reference(tmp_path / "references" / id)
    assert scored.policy.reference.expert == "lander-heuristic" and scored.admission.admitted
    facts = experts.read_facts(tmp_path / "references" / id)
    assert 0 < facts["label_seconds"] < 0.1 and facts["answered"] == 1 and facts["success"] > 0.5
    with pytest.raises(ConfigError, match="expected all, trained or expert"):
        ReferencesConfig(algorithms="experts")
