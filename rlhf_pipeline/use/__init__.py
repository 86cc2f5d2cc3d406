"""Using a finished run: chat with it, score with it, compare its stages, export one."""
