"""Sources of samples: built-in scenes and files."""
