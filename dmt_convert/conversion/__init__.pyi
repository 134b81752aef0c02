# What other folders use.
from .quality_table import Quality as Quality
from .quality_table import QualityRow as QualityRow
from .row_frequency import draw_rows as draw_rows
from .sample import Sample as Sample
from .sample import draw_sample as draw_sample
from .sample import pool_batch as pool_batch
from .sample import sample_size as sample_size
from .started_model import StartedModel as StartedModel
from .started_model import start_model as start_model
