# What other folders use.
from .adapter import adapt_batches as adapt_batches
from .adapter import match_features as match_features
from .batch import Bag as Bag
from .batch import Batch as Batch
from .batch import FloatArray as FloatArray
from .batch import IntArray as IntArray
from .dataset import Dataset as Dataset
from .dealt_batches import Share as Share
from .dealt_batches import adapt_shares as adapt_shares
from .dealt_batches import deal_batches as deal_batches
from .registry import READERS as READERS
from .registry import open_data as open_data
from .row_blocks import RowBatches as RowBatches
from .row_range import take_range as take_range
from .row_selection import join_batches as join_batches
from .row_selection import take_rows as take_rows
from .row_selection import uniform_offsets as uniform_offsets
