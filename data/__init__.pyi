from . import references as references
from .batches import Shape as Shape
from .batches import make_codecs as make_codecs
from .batches import mix as mix
from .shares import DrawsConfig as DrawsConfig
from .store import Dataset as Dataset
from .store import open_dataset as open_dataset
