"""Training: `engine` is the one loop, `training` what stages do around it, `distillation` what two of them share.

The others are parts of these three.
"""
