"""Ways to be quick in tests of something else; each lasts as long as the given patch."""

import pytest

from dmt_convert import report
from dmt_convert.conversion import sample, start
from dmt_convert.serving import exporter


def sample_few(patch: pytest.MonkeyPatch, rows: int = 1024) -> None:
    """Sample fewer inputs when converting."""
    patch.setattr(sample, "sample_size", lambda spec: rows)


def skip_report(patch: pytest.MonkeyPatch) -> None:
    """Convert without drawing and writing the report, which takes longest for tiny models.

    Nor is the frontier measured unasked, which the report shows.
    """
    patch.setattr(start, "is_cheap", lambda *_: False)
    # at the front, which keeps what it has looked up: patched behind it, the patch might outlast
    patch.setattr(report, "render_documents", lambda *_, **__: {})


def skip_export_checks(patch: pytest.MonkeyPatch) -> None:
    """Export without the process that checks the graphs."""
    patch.setattr(exporter, "check_graphs", lambda *_: ())
