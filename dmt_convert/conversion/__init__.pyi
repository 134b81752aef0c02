# What other folders use.
from .convert import Preview as Preview
from .convert import convert_checkpoint as convert_checkpoint
from .convert import default_out as default_out
from .convert import describe_flat as describe_flat
from .convert import find_towers as find_towers
from .convert import measure_checkpoint as measure_checkpoint
from .convert import partition_checkpoint as partition_checkpoint
from .convert import preview_conversion as preview_conversion
from .drawn_inputs import draw_rows as draw_rows
from .quality import describe_weakness as describe_weakness
from .record import describe_partition as describe_partition
from .sample import Sample as Sample
from .sample import draw_sample as draw_sample
from .sample import pool_batch as pool_batch
from .sample import sample_size as sample_size
