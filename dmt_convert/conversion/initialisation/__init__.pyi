# What other folders use.
from .distillation import default_steps as default_steps
from .distillation import distill as distill
from .flat_trace import FlatTrace as FlatTrace
from .flat_trace import trace_flat as trace_flat
from .ridge import refit_linear as refit_linear
from .starts import allot_dims as allot_dims
from .starts import find_closed_form as find_closed_form
from .starts import initialise as initialise
