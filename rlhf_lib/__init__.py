"""Teach, run and compare PPO, GRPO and DPO on small language models. Start at `notebooks/`."""

__version__ = "0.1.0"
