from .conformance import ConformanceError as ConformanceError
from .conformance import check_environment as check_environment
from .isolation.program import Isolation as Isolation
from .registry import UnknownEnvironmentError as UnknownEnvironmentError
from .registry import list_ids as list_ids
from .registry import make as make
