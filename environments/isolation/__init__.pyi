from .environment import Fault as Fault
from .environment import IsolatedEnvironment as IsolatedEnvironment
from .labels import ExpertReport as ExpertReport
from .program import Isolation as Isolation
from .program import WorkerSpec as WorkerSpec
