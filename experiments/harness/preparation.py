"""What a pretraining is, and all that can be known of it before it begins."""

from __future__ import annotations

import collections.abc
import dataclasses
import typing

import jax

from data.batches import Shape
from data.shares import DrawsConfig
from data.store import Dataset
from experiments.harness.batches import Batches, make_batches
from experiments.harness.mesh import HostsConfig, MeshConfig, device_bytes, make_mesh
from experiments.harness.validation import ValidationConfig
from experiments.harness.workdir import FREE
from ldm_jax import sharding, training
from ldm_jax.acting import Decoding, check_decoding
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError, check_at_least, check_finite
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import Model, make_model
from ldm_jax.policy import WeightsDtype
from ldm_jax.training import cost
from ldm_jax.training.optimizer import TrainingConfig

_free: typing.Any = {FREE: True}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """What is trained, on how much.

    Attributes:
      model: shapes of the model.
      training: how it is trained.
      dataset: its path or URL; empty for `dataset/` in the workdir.
      window: T, steps of a training window; at least twice the model's attention window.
      rows: windows of a batch, however many environments there are; each bucket has its share, at least one.
      rows_multiple: that the rows of each bucket are, so that they divide over data x fsdp x accumulation.
      draws: how often each environment is drawn.
      narrow: whether the model's tables have only the rows that its environments need, since others cost as much.
        Without it the policy can be put into any environment that fits the size.
      held_out: each so-many-th stream of the data is kept from training, for the held-out loss; 0 for none.
      checkpoint_steps: steps between two checkpoints.
      max_to_keep: how many of the newest checkpoints stay.
      keep_period: checkpoints of steps that this divides stay too; 0 for none.
      log_steps: steps between two rows of metrics.
      decoding: how the saved policy takes its actions.
      weights_dtype: of the saved policy, `"float32"` or, rounded, in half of the room, `"bfloat16"`.
      evaluation: what is evaluated on the way.
      mesh: over which devices; a run may go on over others.
      hosts: over which processes.
      peak_flops: floating-point operations per second of one device, to compare with; 0 to measure a matrix product.
    """

    model: ModelConfig = SIZES["micro"]
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    dataset: str = dataclasses.field(default="", metadata=_free)
    window: int = 64
    rows: int = 52
    rows_multiple: int = 1
    draws: DrawsConfig = dataclasses.field(default_factory=DrawsConfig)
    narrow: bool = True
    held_out: int = 16
    checkpoint_steps: int = 100
    max_to_keep: int = dataclasses.field(default=2, metadata=_free)
    keep_period: int = dataclasses.field(default=0, metadata=_free)
    log_steps: int = 10
    decoding: Decoding = "card"
    weights_dtype: WeightsDtype = "float32"
    evaluation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig, metadata=_free)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig, metadata=_free)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig, metadata=_free)
    peak_flops: float = dataclasses.field(default=0.0, metadata=_free)

    def __post_init__(self) -> None:
        check_finite(self)
        check_decoding(self.decoding)
        if not self.window >= 2 * self.model.window:
            raise ConfigError(
                f"window is {self.window} steps, expected at least {2 * self.model.window}, twice what attention sees: "
                "else the model is asked for more history than it was trained on"
            )
        counts = ("rows", "rows_multiple", "checkpoint_steps", "max_to_keep", "log_steps")
        check_at_least(self, dict.fromkeys(counts, 1))
        if self.weights_dtype not in typing.get_args(WeightsDtype):
            raise ConfigError(
                f"weights_dtype is {self.weights_dtype!r}, expected {' or '.join(typing.get_args(WeightsDtype))}"
            )
        if self.rows % self.rows_multiple:
            raise ConfigError(f"rows is {self.rows}, expected a multiple of rows_multiple, {self.rows_multiple}")
        if self.held_out < 0 or self.held_out == 1:
            raise ConfigError(f"held_out is {self.held_out}, expected 2 or more, or 0 for none")
        if self.keep_period < 0 or self.keep_period % self.checkpoint_steps:
            raise ConfigError(
                f"keep_period is {self.keep_period}, expected a multiple of checkpoint_steps, {self.checkpoint_steps}"
            )
        if not self.peak_flops >= 0:
            raise ConfigError(f"peak_flops is {self.peak_flops}, expected a positive number, or 0 to measure it")

    @property
    def shape(self) -> Shape:
        """Of the batches."""
        return Shape(self.window, self.rows, self.training.seed, self.draws, self.rows_multiple)

    def fitted(self, codecs: collections.abc.Sequence[Codec]) -> ModelConfig:
        """The shapes of the model that is trained on the environments of some codecs."""
        if not self.narrow:
            return self.model
        categories = max(size for codec in codecs for size in (0, *codec.observation_layout.sizes))
        return self.model.narrowed({codec.bucket for codec in codecs}, categories)


class Prepared(typing.NamedTuple):
    """What can be made of a configuration before anything is written.

    Attributes:
      mesh: of devices, or None.
      batches: to train on.
      cfg: shapes of the model, with the tables that the batches need.
      model: made for the mesh.
      shapes: of the state of training, enough to restore one.
    """

    mesh: jax.sharding.Mesh | None
    batches: Batches
    cfg: ModelConfig
    model: Model
    shapes: training.TrainState


def prepare(config: PretrainConfig, dataset: Dataset, environments: tuple[str, ...] = ()) -> Prepared:
    """Checks all that can be known of a run before it begins; raises as `run` does, and writes nothing."""
    mesh = make_mesh(config.mesh)
    share, drawn_slots = sharding.share_of_rows(mesh), config.training.drawn_slots
    batches = make_batches(dataset, environments, config.model, config.shape, drawn_slots, config.held_out, share)
    sharding.check_rows(mesh, batches.rows, config.training.accumulation)
    cfg = config.fitted(batches.codecs)
    model = make_model(cfg, mesh)
    # Shapes are enough to restore, and parameters take seconds to make.
    shapes = training.state_shapes(model, config.training, mesh)
    cost.check_state_fits(shapes, device_bytes())
    return Prepared(mesh, batches, cfg, model, shapes)
