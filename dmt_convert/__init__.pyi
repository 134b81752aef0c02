__version__: str

from .api import check_data as check_data
from .api import check_machine as check_machine
from .api import convert as convert
from .api import evaluate as evaluate
from .api import export as export
from .api import finetune as finetune
from .api import frontier as frontier
from .api import inspect as inspect
from .api import open_bundle as open_bundle
from .api import partition as partition
from .api import plan as plan
from .api import predict as predict
from .api import preview as preview
from .api import score as score
from .api import unshard as unshard
from .api import verify as verify
from .bundle import Bundle as Bundle
from .bundle import PlainModel as PlainModel
from .errors import DmtError as DmtError
