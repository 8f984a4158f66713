"""Detection: objects in an image, each with a box, a class and a score."""
from __future__ import annotations
from src.configuration.metrics import Metric
from src.configuration.schema import Evaluation
from src.tasks import Task
METRICS = {"ap50": Metric("max", "AP50", is_fraction=True, is_validated=True), "map": Metric("max", "mAP", is_fraction=True, is_validated=True), "loss": Metric("min","loss",is_validated=True), "class_loss":Metric(None,"loss"), "box_loss":Metric(None,"loss")}
class Detection(Task):
    takes = ("boxes",)
    metrics = METRICS
    options = Evaluation
    outputs = ("boxes", "scores", "labels", "counts")
TASK = Detection()
