# What other folders use.
from .figures import plot_partition as plot_partition
from .frontier_figure import plot_frontier as plot_frontier
from .page import render_documents as render_documents
