"""Processes that are ranks of a cluster: their servers, and what ranks do."""
