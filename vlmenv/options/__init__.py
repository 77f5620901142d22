"""Options as dataclasses, and how files and flags become them."""
