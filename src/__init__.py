"""Reproducible experiments: the stages of the pipeline, over the rooms data, models, training and reporting."""
