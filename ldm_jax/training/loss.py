"""The one loss: cross-entropy, in nats, between the reference's action distribution and the model's."""

from __future__ import annotations

import math
import typing

import jax
import jax.numpy as jnp

from ldm_jax.encoding.codec import Targets
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.heads import DrawnSlots, Predictions, bin_centers, bin_probabilities, take_slots
from ldm_jax.model.network import Inputs, Model, Params
from ldm_jax.types import Array

_RUN = 8
"""Steps that have the same slots drawn: what is gathered by slot is so much less."""


class Example(typing.NamedTuple):
    """One bucket's rows of a training batch; a pytree.

    Attributes:
      inputs: what the model reads, leaves `[R, T, ...]`.
      targets: what it is to predict, leaves `[R, T, ...]`.
      environment: `int32 [R]`, which environment a row is from; only metrics look at it.
    """

    inputs: Inputs
    targets: Targets
    environment: Array


class RowMetrics(typing.NamedTuple):
    """Sums over the steps of each row; divide by `weight` or `changed_weight`. `float32 [R]`; a pytree.

    All slots are those that were predicted: where some were drawn, the first two are estimates without bias.

    Attributes:
      loss: cross-entropy in nats, averaged over action slots.
      entropy: of the targets, averaged over action slots: the loss that a perfect model has.
      correct: steps whose most likely action is the label's, in all slots (a continuous slot: within 5 % of its range).
      weight: steps with a label.
      changed_correct: as `correct`, over steps whose label differs from the one before.
      changed_weight: the number of those.
      environment: `int32 [R]`, which environment a row is from.
    """

    loss: Array
    entropy: Array
    correct: Array
    weight: Array
    changed_correct: Array
    changed_weight: Array
    environment: Array


def slot_losses(cfg: ModelConfig, predictions: Predictions, targets: Targets) -> tuple[Array, Array, Array]:
    """Cross-entropy, target entropy and correctness of each action slot.

    Args:
      cfg: the bins.
      predictions: `[R, T, K, V]` and `[R, T, C, bins]`.
      targets: of the same steps and slots.

    Returns:
      Three arrays `float32 [R, T, K + C]`; padded slots hold zeros or anything and must be masked.
    """
    bins = bin_probabilities(cfg, targets.mean, targets.scale)
    pairs = ((targets.probabilities, predictions.choice_logits), (bins, predictions.bin_logits))
    losses, totals = zip(*(cross_entropy(*pair) for pair in pairs), strict=True)
    entropies = [jnp.sum(jax.scipy.special.entr(probabilities), -1) for probabilities, _ in pairs]
    right_choice = _first_largest(predictions.choice_logits) == _first_largest(targets.probabilities)
    right_choice &= predictions.choice_logits.shape[-1] > 0
    decoded = jnp.sum(jnp.exp(predictions.bin_logits - totals[1][..., None]) * bin_centers(cfg), -1)
    right_number = jnp.abs(jnp.clip(decoded, -1, 1) - targets.mean) < 0.1
    correct = jnp.concatenate([right_choice, right_number], -1)
    return jnp.concatenate(losses, -1), jnp.concatenate(entropies, -1), correct.astype(jnp.float32)


@jax.custom_vjp
def cross_entropy(probabilities: Array, logits: Array) -> tuple[Array, Array]:
    """Cross-entropy in nats, and the logarithm of the sum of exponentials of the logits, of which there is no gradient.

    Args:
      probabilities: `[..., V]`, non-negative, constants: there is no gradient of them either.
      logits: `[..., V]`.

    Returns:
      Two arrays `[...]`.
    """
    total = jax.nn.logsumexp(logits, -1, keepdims=True)
    # Not by log-probabilities: they would be one more array of this size.
    likely = jnp.where(probabilities > 0, probabilities * (logits - total), 0.0)
    return -jnp.sum(likely, -1), total[..., 0]


def _cross_entropy_forward(probabilities: Array, logits: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    loss, total = cross_entropy(probabilities, logits)
    return (loss, total), (probabilities, logits, total, probabilities.sum(-1))


def _cross_entropy_backward(saved: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[None, Array]:
    probabilities, logits, total, mass = saved
    # In one pass: what differentiation would save are the exponentials, one more array.
    expected = jnp.exp(logits - total[..., None]) * mass[..., None]
    return None, (expected - probabilities) * gradients[0][..., None]


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _first_largest(x: Array) -> Array:
    """As `argmax` over the last axis, by two plain reductions, which are several times as fast on a CPU."""
    places = jnp.where(x == x.max(-1, keepdims=True, initial=-jnp.inf), jnp.arange(x.shape[-1]), x.shape[-1])
    return places.min(-1, initial=x.shape[-1])


def select_labels(inputs: Inputs, targets: Targets) -> Targets:
    """Targets with zeros wherever there is no label: in steps without weight, and in slots and choices of padding.

    They are selected, not multiplied: whatever lies in these places, NaN too, reaches neither loss nor gradient.

    Args:
      inputs: whose signature says what is padding.
      targets: of the same rows, leaves `[R, T, ...]`.

    Returns:
      Targets of the same shapes.
    """
    steps, signature = targets.weight > 0, inputs.signature
    choices = signature.choice_mask & (signature.choice_slots > 0)[..., None]
    numbers = steps[..., None] & (signature.continuous_slots > 0)[:, None]
    return Targets(
        probabilities=jnp.where(steps[..., None, None] & choices[:, None], targets.probabilities, 0.0),
        mean=jnp.where(numbers, targets.mean, 0.0),
        scale=jnp.where(numbers, targets.scale, 0.0),
        weight=targets.weight,
        changed=jnp.where(steps, targets.changed, 0.0),
    )


def labelled_steps(batch: dict[str, Example]) -> Array:
    """`float32 []`, the number of steps of a batch that have a label, at least 1."""
    return jnp.maximum(sum(example.targets.weight.sum() for example in batch.values()), 1.0)


def imitation_loss(
    model: Model, cfg: ModelConfig, params: Params, batch: dict[str, Example], labelled: Array | None = None
) -> tuple[Array, dict[str, RowMetrics]]:
    """The mean loss over all labelled steps of a batch.

    Args:
      model: the pure functions.
      cfg: its configuration.
      params: its parameters.
      batch: by bucket name.
      labelled: what the sum is divided by; default: the number of the batch's own labelled steps.

    Returns:
      The loss, and each bucket's metrics by row.
    """
    predictions, _ = model.apply(params, {name: example.inputs for name, example in batch.items()})
    metrics = {}
    for name, (inputs, labels, environment) in batch.items():
        targets = _drawn_targets(inputs.drawn, select_labels(inputs, labels))
        losses, entropies, correct = slot_losses(cfg, predictions[name], targets)
        per_slot = _slot_weights(inputs)
        slots = per_slot > 0
        step_loss = jnp.sum(jnp.where(slots, losses, 0.0) * per_slot, -1)
        step_entropy = jnp.sum(jnp.where(slots, entropies, 0.0) * per_slot, -1)
        all_correct = jnp.prod(jnp.where(slots, correct, 1.0), -1)
        changed = targets.weight * targets.changed
        metrics[name] = RowMetrics(
            loss=jnp.sum(step_loss * targets.weight, -1),
            entropy=jnp.sum(step_entropy * targets.weight, -1),
            correct=jnp.sum(all_correct * targets.weight, -1),
            weight=jnp.sum(targets.weight, -1),
            changed_correct=jnp.sum(all_correct * changed, -1),
            changed_weight=jnp.sum(changed, -1),
            environment=environment,
        )
    total = sum(rows.loss.sum() for rows in metrics.values())
    return total / (labelled_steps(batch) if labelled is None else labelled), metrics


def _drawn_targets(drawn: DrawnSlots, targets: Targets) -> Targets:
    return targets._replace(
        probabilities=take_slots(targets.probabilities, drawn.choices),
        mean=take_slots(targets.mean, drawn.numbers),
        scale=take_slots(targets.scale, drawn.numbers),
    )


def _slot_weights(inputs: Inputs) -> Array:
    """What each predicted slot counts for in the loss of a step, `[R, T, slots]`: with sum 1, 0 for padding."""
    signature, steps = inputs.signature, inputs.features.reward.shape[1]
    weights, total = [], jnp.zeros(())
    for slots, drawn in zip((signature.choice_slots, signature.continuous_slots), inputs.drawn, strict=True):
        count = slots.sum(-1)[:, None, None]
        taken = take_slots(jnp.broadcast_to(slots[:, None], (len(slots), steps, slots.shape[-1])), drawn)
        # Those drawn stand for all of their kind.
        weights.append(taken * (count / jnp.maximum(taken.sum(-1, keepdims=True), 1.0)))
        total = total + count
    return jnp.concatenate(weights, -1) / total


def draw_slots(key: Array, batch: dict[str, Example], most: int) -> dict[str, Example]:
    """Draws the slots that a loss looks at where actions have more: an estimate of their mean, without bias.

    A run of up to eight steps has `most` slots one after the other, and the run after it has those that follow, round
    and round through the slots of the environment; where that begins is drawn for each row.

    Args:
      key: typed key.
      batch: by bucket name.
      most: slots of a kind of one step.

    Returns:
      The batch, with `inputs.drawn` where a bucket has more slots of a kind than that.
    """

    def draw(key: Array, slots_RA: Array, steps: int) -> Array | None:
        if slots_RA.shape[-1] <= most:
            return None
        count_R = slots_RA.sum(-1).astype(jnp.int32)
        start_R = jax.random.randint(key, count_R.shape, 0, jnp.maximum(count_R, 1))
        runs = steps // math.gcd(steps, _RUN)
        places = start_R[:, None, None] + jnp.arange(runs * most).reshape(runs, most)
        few = count_R[:, None, None] <= most  # they need no draw; what lies beyond them is padding
        return jnp.where(few, jnp.arange(most), places % jnp.maximum(count_R, 1)[:, None, None])

    drawn = {}
    for i, (name, example) in enumerate(sorted(batch.items())):
        signature, steps = example.inputs.signature, example.inputs.features.reward.shape[1]
        keys = jax.random.split(jax.random.fold_in(key, i))
        of_both = (signature.choice_slots, signature.continuous_slots)
        places = DrawnSlots(*(draw(key, slots, steps) for key, slots in zip(keys, of_both, strict=True)))
        drawn[name] = example._replace(inputs=example.inputs._replace(drawn=places))
    return drawn


def drop_previous_actions(key: Array, batch: dict[str, Example], probability: float) -> dict[str, Example]:
    """Hides the previous action in whole windows, so that a policy that copies its last action does not look good.

    Args:
      key: typed key.
      batch: by bucket name.
      probability: of hiding it in a row.

    Returns:
      The batch with `has_previous` set to 0 in the rows drawn.
    """
    dropped = {}
    for i, (name, example) in enumerate(sorted(batch.items())):
        features = example.inputs.features
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1.0 - probability, features.has_previous.shape[:1])
        features = features._replace(has_previous=jnp.where(keep[:, None], features.has_previous, 0.0))
        dropped[name] = example._replace(inputs=example.inputs._replace(features=features))
    return dropped
