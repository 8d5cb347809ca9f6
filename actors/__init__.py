"""Everything that runs on Ray: tasks, actors and trainers."""
