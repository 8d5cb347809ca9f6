"""What a user runs and gets: configuration, arms, tracking, report and the command line."""
