"""Shows what is in a data set before it is ingested."""
