"""`report.html`: one page, by itself, that shows what a run did. No torch."""

from rlhf_pipeline.report.page import FILE, write

__all__ = ["FILE", "write"]
