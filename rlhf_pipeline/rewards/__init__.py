"""What replies are rewarded by beside a reward stage: functions, and sequence classifiers."""
