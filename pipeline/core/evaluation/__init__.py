"""What a network's answers are worth, as numbers, charts and a report."""
