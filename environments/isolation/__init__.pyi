from .environment import Fault as Fault
from .environment import IsolatedEnvironment as IsolatedEnvironment
from .program import Isolation as Isolation
from .program import WorkerSpec as WorkerSpec
