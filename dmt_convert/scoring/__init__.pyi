# What other folders use.
from .evaluate import evaluate_model as evaluate_model
from .evaluate import score_to_file as score_to_file
from .scored_model import ScoredModel as ScoredModel
from .scored_model import open_model as open_model
from .scored_model import score_data as score_data
from .verify import DEFAULT_ATOL as DEFAULT_ATOL
from .verify import DEFAULT_RTOL as DEFAULT_RTOL
from .verify import VerifyReport as VerifyReport
from .verify import verify_models as verify_models
