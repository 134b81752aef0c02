"""What tests share: builders of tiny things, writers of files, servers of ranks.

Plain modules for plain imports, as in `from support.checkpoints.flat import make_flat`; pytest
puts this folder's parent on the path. Fixtures are in the files `conftest.py`, and are only those
that tear something down, or keep what is expensive to make.
"""
