"""Studies for pages of docs/: each module says at its top what it measures, and how it is called."""

if __name__ != "benchmarks.studies":  # the link fastdpo/benchmarks leads here too
    raise ImportError(f"{__name__} is benchmarks.studies, in a clone of the repository")
