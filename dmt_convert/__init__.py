"""Turn flat recommendation checkpoints into Disaggregated Multi-Tower models."""

__version__ = "0.1.0"
