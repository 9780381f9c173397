from . import references as references
from .batches import mix as mix
from .store import open_dataset as open_dataset
