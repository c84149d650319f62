"""What stages share; nothing in here imports a stage. What several packages use lies here itself; the packages:

intake/      what stage prepare is made of: sources, archives, refusals, shards
data/        prepared images as views, in batches
softlabels/  the cache of soft labels: its format, and its files
mining/      near-copies, likeness, ranking
train/       the training loop, losses, optimizers, checkpoints
evaluation/  metrics, charts, the report
results/     what goes to MLflow: runs, and versions of the registered model
running/     what starts, checks and ends stages; no stage imports it
"""
