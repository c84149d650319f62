"""Which pool images are taken: near-copies, likeness, ranking, and the sheet that shows them."""
