"""Engines: other copies of the policy, which generate completions faster."""
