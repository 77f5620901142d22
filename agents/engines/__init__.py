"""What generates completions, apart from the policy's own module."""
