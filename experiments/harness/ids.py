"""Lists of environment ids, as flags and programs give them: one parser for all stages."""

from __future__ import annotations

import collections.abc

import environments
from experiments.harness.workdir import WorkdirError
from ldm_jax.encoding.buckets import bucket_for
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.environment import LibraryMissingError
from ldm_jax.errors import LdmError
from ldm_jax.model.config import ModelConfig


def parse_ids(ids: str | collections.abc.Iterable[str]) -> tuple[str, ...]:
    """Reads a list of environment ids.

    Args:
      ids: a text with commas between the ids, or several. Blanks around an id and empty ones do not count.

    Returns:
      The ids, in their order.

    Raises:
      WorkdirError: an id is given twice.
    """
    texts = [ids] if isinstance(ids, str) else ids
    found = tuple(id for text in texts for word in text.split(",") if (id := word.strip()))
    if twice := sorted({id for id in found if found.count(id) > 1}):
        raise WorkdirError(f"the list of environments holds {', '.join(twice)} twice; give each one once")
    return found


def find_unfit(ids: collections.abc.Iterable[str], model: ModelConfig | None = None) -> dict[str, str]:
    """Finds the environments that nothing can be done with, before anything is done with the first.

    Args:
      ids: of environments; each is made once.
      model: that they have to fit; default: the largest there may be.

    Returns:
      The reason, by id: it cannot be made here, or its spaces are too large.

    Raises:
      UnknownEnvironmentError: an id that is not known; says the nearest ones.
      LibraryMissingError: its library is not installed; says the extra to install.
    """
    reasons = {}
    for id in ids:
        try:
            environment = environments.make(id)
            environment.close()
            seen, acted = environment.spec.observation_space, environment.spec.action_space
            bucket = bucket_for(seen, acted)
            if model:
                model.check_fits(bucket, id, max(observation_layout(seen).sizes, default=0))
        except (environments.UnknownEnvironmentError, LibraryMissingError):
            raise
        except LdmError as error:
            reasons[id] = str(error)
    return reasons
