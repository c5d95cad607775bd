"""Probes in trainers of other libraries, one line each; the trainer's library is imported there only."""
