"""Where it runs: Ray tasks, actors and trainers."""
