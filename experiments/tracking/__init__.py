"""MLflow: log a run there, and read runs back to compare them."""
