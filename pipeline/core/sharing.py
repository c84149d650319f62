"""How a batch is shared out: to processes, and by each of them to parts that it computes one after another."""


def images_at_once(batch_size: int, accumulate: int, processes: int = 1, images: int | None = None) -> int:
    """Give how many images of a batch a process computes at a time, the fewest where its parts differ.

    Alone it needs two, for BatchNorm. Several need as many each, if only one: their BatchNorm sees those of all.

    Args:
        images: to train on, of which a batch has no more; None: not known yet.

    Raises:
        ValueError: there are fewer than two, or a batch cannot be shared out so; it says what to set.
    """
    if images is not None and images < 2:
        found = f"there is {'one' if images else 'no'} image to train on, and it takes two"
        raise ValueError(f"{found}: see data/prepare/summary.json for what was found")
    batch, shares = min(batch_size, images or batch_size), processes * accumulate
    what = f"a batch of {batch} images" if batch == batch_size else f"a batch of all {batch} images"
    if processes == 1 and batch < 2 * accumulate:
        raise ValueError(
            f"{what} in {accumulate} parts (accumulate) leaves a part fewer than two, and BatchNorm needs two: set the "
            f"stage's accumulate to {batch // 2}"
        )
    if processes > 1 and batch % shares:
        each = f" in {accumulate} parts each" if accumulate > 1 else ""
        other = "accumulate or machine.processes to" if each else "machine.processes to"
        even = max(2, batch // shares) * shares  # two at a time, where there are so many: some losses compare them
        even = even if images is None else min(even, images // shares * shares)
        mend = f"the stage's batch_size to {even}, or {other} another" if even else f"{other} a smaller"
        raise ValueError(f"{what} cannot be shared out evenly to {processes} processes{each}: set {mend} number")
    return batch // shares
