"""Measure a model on held-out questions (`metrics`) and turn a run folder into one page (`report`)."""
