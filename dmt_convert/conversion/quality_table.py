"""The quality table as data: see `dmt_convert.documents`."""

from dmt_convert.documents import Quality as Quality
from dmt_convert.documents import QualityRow as QualityRow
