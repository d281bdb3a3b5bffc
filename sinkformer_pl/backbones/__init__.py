"""Networks of other libraries as backbones of a task, under any normalization."""

from sinkformer_pl.backbones.hugging_face_backbone import HuggingFaceBackbone
from sinkformer_pl.backbones.timm_backbone import TimmBackbone

__all__ = ["HuggingFaceBackbone", "TimmBackbone"]
