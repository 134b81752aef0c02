# What other folders use.
from .report import CheckResult as CheckResult
from .report import SelftestReport as SelftestReport
from .runner import run_selftest as run_selftest
