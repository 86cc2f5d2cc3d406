"""Reward hacking: what replies, rewards and judges say of a policy that is optimised further and further. No torch."""
