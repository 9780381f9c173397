"""Evaluation while a model is trained: its loss on streams held out, and its returns in a few environments."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing

import jax
import numpy as np

import environments as registry
from experiments.harness import progress
from experiments.harness.batches import Batches
from experiments.harness.ids import parse_ids
from experiments.harness.metrics_log import mean_by
from experiments.harness.workdir import key_of
from ldm_jax import acting, sharding
from ldm_jax.acting import Decoding, check_agent
from ldm_jax.cards import check_matches
from ldm_jax.environment import Environment
from ldm_jax.errors import ConfigError, check_at_least
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Model, Params
from ldm_jax.training import metrics
from ldm_jax.training.loss import RowMetrics, imitation_loss
from ldm_jax.types import PyTree

_ROWS = 128
"""Of a batch that the policy acts in."""


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """What is evaluated, and how often. Training does not depend on it.

    Attributes:
      steps: between two evaluations; there is one after the last step too. 0 for none at all.
      batches: of windows of the streams held out, always the same ones.
      environments: ids to act in, with commas between; none are also possible.
      rows: parallel rows in each.
      episodes: per row.
    """

    steps: int = 200
    batches: int = 4
    environments: str = ""
    rows: int = 16
    episodes: int = 1

    def __post_init__(self) -> None:
        check_at_least(self, {"steps": 0, "batches": 0, "rows": 2, "episodes": 1}, "evaluation.")
        _ = self.ids  # they are checked

    @property
    def ids(self) -> tuple[str, ...]:
        """The environments to act in."""
        return parse_ids(self.environments)


class Validation:
    """Evaluates parameters again and again; use as a context manager, which closes the environments."""

    def __init__(
        self,
        config: ValidationConfig,
        model: Model,
        model_cfg: ModelConfig,
        batches: Batches,
        decoding: Decoding,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Prepares; the environments are made when the context is entered.

        Args:
          config: what to evaluate.
          model: the pure functions, made for the mesh.
          model_cfg: shapes of the model.
          batches: the environments, and the streams held out.
          decoding: how actions are taken.
          mesh: what the parameters are split over.

        Raises:
          ConfigError: an environment to act in that is not trained on.
        """
        known = {codec.card.id: codec for codec in batches.codecs}
        if unknown := [id for id in config.ids if id not in known]:
            raise ConfigError(
                f"evaluation.environments names {', '.join(unknown)}, on which nothing is trained: "
                f"choose among {', '.join(sorted(known))}"
            )
        self._config, self._mesh, self._held_out, self._known = config, mesh, batches.held_out, known
        self._domains, self._ids = [codec.card.domain for codec in batches.codecs], list(known)
        self._model_cfg, self._decoding = model_cfg, decoding
        everywhere = sharding.replicated(mesh) if mesh else None
        self._loss = jax.jit(functools.partial(imitation_loss, model, model_cfg), out_shardings=everywhere)
        self._whole = jax.jit(lambda params: params, out_shardings=everywhere)
        self._open: dict[str, Environment] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Validation:
        """Makes the environments to act in, once, so that each one's step is compiled once.

        Raises:
          UnknownEnvironmentError: there is no such environment any more.
          LibraryMissingError: its library is not installed.
          CardError: it is not the one that the dataset was collected in.
          ConfigError: the model is one that does not act.
        """
        with contextlib.ExitStack() as closing:
            for id in self._config.ids if self._config.steps and not jax.process_index() else ():
                check_agent(self._model_cfg, self._known[id], self._decoding)
                environment = closing.enter_context(contextlib.closing(registry.make(id, self._config.rows)))
                check_matches(self._known[id].card, environment.spec, f"the dataset's data of {id}")
                self._open[id] = environment
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def due(self, step: int, steps: int) -> bool:
        """Whether there is an evaluation after `step` of `steps` steps."""
        every = self._config.steps
        return bool(every) and (step % every == 0 or step == steps)

    def __call__(self, params: Params) -> dict[str, typing.Any]:
        """Evaluates.

        Returns:
          A part of a row of metrics: `held_out`, and `evaluation` with mean return and z by environment.
        """
        found: dict[str, typing.Any] = {}
        if self._held_out is not None and self._config.batches:
            found["held_out"] = self._held_out_loss(params)
        if self._config.ids:
            params = self.whole(params)
            found["evaluation"] = self._act(params)
        return found

    def whole(self, params: Params) -> PyTree:
        """Parameters as NumPy arrays, on every process."""
        return jax.device_get(self._whole(params) if self._mesh else params)

    def _held_out_loss(self, params: Params) -> dict[str, typing.Any]:
        assert self._held_out is not None
        collected: list[dict[str, RowMetrics]] = []
        for number in range(self._config.batches):
            batch = self._held_out[number]
            _, rows = self._loss(params, sharding.place_batch(self._mesh, batch) if self._mesh else batch)
            collected.append(jax.device_get(rows))
        rows = {f"{name}/{i}": metrics for i, one in enumerate(collected) for name, metrics in one.items()}
        summary = metrics.summarize(rows)
        kl, labelled = summary["kl_by_environment"], summary["labelled_by_environment"]
        total = sum(float(metrics.loss.sum()) for metrics in rows.values())
        return {
            "loss": total / max(summary["useful_tokens"], 1),
            **{name: summary[name] for name in ("kl", "accuracy", "changed_accuracy")},
            "kl_by_environment": {self._ids[i]: value for i, value in kl.items()},
            "kl_by_domain": mean_by(self._domains, kl, labelled),
        }

    def _act(self, params: PyTree) -> dict[str, dict[str, float]]:
        trials = [
            acting.Trial(
                codec=self._known[id],
                make=functools.partial(self._open.__getitem__, id),
                rows=self._config.rows,
                episodes=self._config.episodes,
                key=_key(id),
                decoding=self._decoding,
                keep_open=True,
            )
            for id in self._open
        ]
        found = dict[str, dict[str, float]]()
        for played in acting.play_trials(self._model_cfg, params, trials, _ROWS):
            card = played.trial.codec.card
            if played.episodes is None:  # training does not depend on it
                progress.logger.warning("cannot evaluate in %s: %s", card.id, played.error)
                continue
            mean = float(np.mean(played.episodes.returns, dtype=np.float64))
            random, reference = card.random_returns.mean, card.reference_returns.mean
            found[card.id] = {"return": mean, "z": (mean - random) / (reference - random)}
        return {id: found[id] for id in self._open if id in found}


def _key(id: str) -> jax.Array:
    return key_of(0, "validation", id)
