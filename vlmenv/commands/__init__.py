"""Commands of `vlmenv`: one module each, imported when the command is called."""
