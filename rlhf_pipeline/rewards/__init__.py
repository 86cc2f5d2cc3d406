"""What replies are rewarded by: reward models on the shared base, functions of the user's, and sequence classifiers."""
