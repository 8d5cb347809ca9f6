"""MLflow: what is logged, by whom, and what a comparison reads back."""
