"""Around a training run: its processes, its directory, its evaluation and its model card."""
