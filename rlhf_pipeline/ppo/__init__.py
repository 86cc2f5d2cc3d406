"""PPO on one shared base: our own trainer, which goes on from where TRL dropped its own."""
