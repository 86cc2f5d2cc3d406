"""PPO trainers, as the tests of PPO have them."""

from tests.ppo.conftest import make_trainer, prompts

__all__ = ["make_trainer", "prompts"]
