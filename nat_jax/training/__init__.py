"""What surrounds the train step: set-up, host-side matching, checkpoints, metrics."""
