# What other folders use.
from .evaluate import Evaluation as Evaluation
from .evaluate import evaluate_model as evaluate_model
from .evaluate import score_to_file as score_to_file
from .scored_model import ScoredModel as ScoredModel
from .scored_model import Scores as Scores
from .scored_model import open_model as open_model
from .scored_model import open_scored as open_scored
from .scored_model import score_data as score_data
from .verify import Check as Check
from .verify import VerifyReport as VerifyReport
from .verify import check_bytes as check_bytes
from .verify import verify_models as verify_models
