"""What stages share; nothing in here imports a stage. The packages:

intake/      what stage prepare is made of: sources, archives, refusals, shards
data/        prepared images as views, in batches
softlabels/  the cache of soft labels: its format, and its files
mining/      near-copies, likeness, ranking
train/       the training loop, losses, optimizers, checkpoints
evaluation/  metrics, near-copies of labelled images in the test split, charts, the report
results/     what goes to MLflow: runs, exported networks, versions of the registered model
running/     what starts, checks and ends stages; no stage imports it

What several of these use lies here itself:

stage, signals, resume, errors    how a stage begins, is stopped, goes on after that, and ends
recorded                          whether DVC will record what a stage's result is of
params, sections                  params.yaml, read and checked
devices, sharing                  where a process computes, beside which others, and its share of a batch
networks, network_checks, weights classifiers as files; whether they take what they are shown; state dicts
small_maps                        convolutions of small maps, faster on a CPU
teaching, labelling, recheck      what the teacher is asked; asking it about all views; asking it once more
atomic, digests, tables, progress files that appear whole, SHA-256, CSV, progress lines
"""
