# What other folders use.
from .figures import plot_partition as plot_partition
from .page import render_documents as render_documents
