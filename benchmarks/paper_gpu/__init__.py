"""A GPU on paper: what an update's micro-batch takes on a card that is not there. See README.md."""
