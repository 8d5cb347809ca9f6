"""What a network is fed: the plan of samples, and how one is made."""
