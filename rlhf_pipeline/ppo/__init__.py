"""PPO on one shared base: TRL's trainer and config, with a loop of our own that mends what TRL's leaves undone."""
