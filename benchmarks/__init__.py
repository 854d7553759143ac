"""Benchmarks of the head and of whole training steps beside peers, installed as `fastdpo.benchmarks`.

The studies behind other pages of the documentation are in `studies/`. They are not installed, and run in a clone of
the repository as `python -m benchmarks.studies.NAME`.
"""

if __name__ == "benchmarks":  # from a clone: all but the studies is imported as fastdpo.benchmarks, by this name alone
    import benchmarks.studies  # noqa: F401

    __path__.clear()
