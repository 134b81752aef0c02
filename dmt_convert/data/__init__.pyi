# What other folders use, and authors of readers.
from .adapter import adapt_batches as adapt_batches
from .adapter import match_features as match_features
from .batch import Bag as Bag
from .batch import Batch as Batch
from .batch import join_batches as join_batches
from .batch import take_rows as take_rows
from .batch import uniform_offsets as uniform_offsets
from .dataset import Dataset as Dataset
from .dataset import RowBatches as RowBatches
from .dataset import take_range as take_range
from .dealt_batches import Share as Share
from .dealt_batches import adapt_shares as adapt_shares
from .dealt_batches import deal_batches as deal_batches
from .readers import READERS as READERS
from .readers import open_data as open_data
