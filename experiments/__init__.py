"""Why it runs: configuration, arms, tracking, report and the command line."""
