"""Reward hacking: what shows that a policy has learnt its reward's flaws. Numpy only, no torch."""
