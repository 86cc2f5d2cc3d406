"""`python -m rlhf_pipeline` is `rlhf-pipeline`."""

from rlhf_pipeline.cli import main

main()
