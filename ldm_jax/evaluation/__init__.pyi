from . import aggregates as aggregates
from . import scaling_law as scaling_law
from . import scores as scores
