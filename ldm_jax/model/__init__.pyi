from .config import SIZES as SIZES
from .config import ModelConfig as ModelConfig
from .heads import Predictions as Predictions
from .network import Inputs as Inputs
from .network import Model as Model
from .network import Params as Params
from .network import count_parameters as count_parameters
from .network import make_model as make_model
