"""The samples that a network trains on: their plan, and how they are made."""
