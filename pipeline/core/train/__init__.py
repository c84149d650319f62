"""Training: the one loop, what moves the weights, losses, distillation, checkpoints."""
