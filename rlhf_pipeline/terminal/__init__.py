"""What people see of a run on a terminal. No torch."""
