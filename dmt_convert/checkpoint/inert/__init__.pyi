# What the readers of checkpoints use.
from .content import PickledContent as PickledContent
from .content import collect_content as collect_content
from .deepctr import DEEPCTR_MODULE as DEEPCTR_MODULE
from .objects import DCP_GLOBALS as DCP_GLOBALS
from .objects import Record as Record
from .objects import StorageRef as StorageRef
from .objects import TensorRef as TensorRef
from .objects import UnknownGlobal as UnknownGlobal
from .objects import is_size as is_size
from .objects import read_sizes as read_sizes
from .sharded import ShardedRef as ShardedRef
from .sharded import ShardPlace as ShardPlace
from .unpickler import read_pickle as read_pickle
from .unpickler import refuse_global as refuse_global
