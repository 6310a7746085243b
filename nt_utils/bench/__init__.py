"""Speed and memory of the scores against the plain forward pass: ``python -m nt_utils.bench`` (or ``make bench``)."""
