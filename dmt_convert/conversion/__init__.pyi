# What other folders use.
from .drawn_inputs import draw_rows as draw_rows
from .module_choice import choose_modules as choose_modules
from .module_choice import default_strategy as default_strategy
from .module_choice import may_allot as may_allot
from .sample import Sample as Sample
from .sample import draw_sample as draw_sample
from .sample import pool_batch as pool_batch
from .sample import sample_size as sample_size
from .start import StartedModel as StartedModel
from .start import start_model as start_model
