"""One recipe, one command: SFT, reward model, PPO and DPO with Hugging Face TRL."""

__version__ = "0.1.0"
