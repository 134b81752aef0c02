# What other folders use.
from .allotment import allot_dims as allot_dims
from .closed_form import initialise as initialise
from .distillation import default_steps as default_steps
from .distillation import distill as distill
from .flat_trace import trace_flat as trace_flat
from .ridge import refit_linear as refit_linear
