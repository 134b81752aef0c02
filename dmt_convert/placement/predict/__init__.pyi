# What other folders use.
from .assumptions import Assumptions as Assumptions
from .collectives import Network as Network
from .cost_model import Machine as Machine
from .cost_model import StepTime as StepTime
from .prediction import PlacedStep as PlacedStep
from .prediction import Prediction as Prediction
from .prediction import describe_machine as describe_machine
from .prediction import predict_placement as predict_placement
from .prediction import predict_plan as predict_plan
from .presets import GPUS as GPUS
from .presets import find_gpu as find_gpu
from .scaling import ScalePoint as ScalePoint
from .scaling import predict_scaling as predict_scaling
from .scaling_plot import plot_scaling as plot_scaling
from .suggestion import Suggestion as Suggestion
from .suggestion import suggest as suggest
