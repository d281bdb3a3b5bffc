"""Networks of other libraries as backbones of a task, under any normalization."""

from sinkformer_pl.backbones.hugging_face_backbone import HuggingFaceBackbone

__all__ = ["HuggingFaceBackbone"]
