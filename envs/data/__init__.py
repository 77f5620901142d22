"""Where samples come from: built-in scenes and files."""
