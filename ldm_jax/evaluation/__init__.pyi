from . import aggregates as aggregates
from . import bootstrap as bootstrap
from . import scaling_law as scaling_law
from . import scores as scores
