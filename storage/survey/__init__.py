"""What is in a data set, before it is ingested."""
