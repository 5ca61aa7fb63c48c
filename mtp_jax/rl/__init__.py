"""Reinforcement learning with verifiable rewards: rollouts, rewards, and updates of the policy."""
