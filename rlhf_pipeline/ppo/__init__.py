"""PPO on one shared base: our own trainer, which continues the one that TRL removed."""
