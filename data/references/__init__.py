"""Reference policies: found, scored and admitted without a hand in between."""

from .action_range import ActionRangeError
from .learning import DivergenceError
from .pipeline import ScoredReference, score_further, score_reference, train_reference
from .policy import ReferencePolicy, random_agent
from .recipes import Recipe
from .saving import ReferencePolicyError, load_reference, save_reference

__all__ = [
    "ActionRangeError",
    "DivergenceError",
    "Recipe",
    "ReferencePolicy",
    "ReferencePolicyError",
    "ScoredReference",
    "load_reference",
    "random_agent",
    "save_reference",
    "score_further",
    "score_reference",
    "train_reference",
]
