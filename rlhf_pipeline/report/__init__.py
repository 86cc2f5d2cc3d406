"""`report.html`: one page, by itself, that shows what a run did. No torch."""

from rlhf_pipeline.report.page import write

__all__ = ["write"]
