"""The table of references says what the folders say, and nothing better."""

import dataclasses
import json

import numpy as np

import environments
from data import references
from data.references import ppo
from experiments import references_table
from experiments.harness.outcomes import UnitOutcome, write_outcome
from ldm_jax import cards

ID = "gymnax/Catch-bsuite"


def test_every_environment_has_a_line_and_weak_ones_say_so(tmp_path):
    how = references.Recipe("ppo", ppo.PPOConfig(budget_steps=4096, rollout_length=32, hidden=(8,)))
    scored = references.score_reference(environments.make, references.train_reference(environments.make, ID, how))
    made = dataclasses.replace(scored.policy.reference, public_target=1.0)
    policy = dataclasses.replace(scored.policy, reference=made)
    random = cards.Returns.of(np.array([[-0.6, -0.4]]))
    for name, mean, verdict in (
        ("gymnax/Weak", 0.0, "admitted"),
        (ID, 0.95, "admitted"),
        ("gymnax/Worse", -0.5, "refused"),
    ):
        returns = cards.Returns.of(np.full((1, 2), mean) + np.array([[-0.01, 0.01]]))
        references.save_reference(
            tmp_path / name,
            dataclasses.replace(scored, policy=policy, random_returns=random, reference_returns=returns),
        )
        write_outcome(tmp_path / name, UnitOutcome(verdict, "as said", train_seconds=90.0, score_seconds=30.0))
    write_outcome(tmp_path / "gymnax/Failed", UnitOutcome("failed", "no licence found", "faults"))
    write_outcome(tmp_path / "gymnax/Damaged", UnitOutcome("admitted", "as said"))
    page = references_table.render_references(references_table.find_references(tmp_path))
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| gymnax")}
    assert len(lines) == 5
    assert "| 0.97 | 90 + 30 |" in lines[ID] and "weak" not in lines[ID]
    assert "| 0.33 |" in lines["gymnax/Weak"] and "**weak**" in lines["gymnax/Weak"]
    assert "refused: as said" in lines["gymnax/Worse"] and "no licence found" in lines["gymnax/Failed"]
    assert "failed: " in lines["gymnax/Damaged"], "what cannot be read is no reference"
    assert "Of 3 with a public return 1 get 0.9 of the way to it; weak: 2" in " ".join(page.split())
    assert json.loads((tmp_path / ID / "outcome.json").read_text())["train_seconds"] == 90.0
