"""What several stages need. Nothing in here imports a stage."""
