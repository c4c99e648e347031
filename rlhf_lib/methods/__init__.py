"""SFT, reward model, PPO, GRPO and DPO on live objects: one `update` and one `train` each."""
