"""A small project that is run up to its cache: its settings, and its stages in the present folder."""

from images import tiny


def settings(**changes):
    """The teacher sees labelled images alone, so it stays the same when the pool grows; all of the pool is mined."""
    usual = {"teacher.fit_on": "labelled", "teacher.epochs": 1, "mine.per_class": 1000, "views.mix_probability": 0.5}
    return tiny(**{**usual, **changes})


def go(*stages, **changes):
    """Run some stages, with some settings changed."""
    for stage in stages:
        stage.run(settings(**changes))
