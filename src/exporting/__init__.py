"""Trained models as ONNX graphs, with all that calling them needs."""
