"""What a finished run is good for: talk to it, score with it, compare its stages, export one."""
