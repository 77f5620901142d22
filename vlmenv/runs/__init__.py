"""A run on disk and on screen: its folder, checkpoints, trackers, pictures and progress."""
