"""What a run left on disk, and the truth about it. No torch."""
