"""What goes to MLflow: runs, and versions of the registered model."""
