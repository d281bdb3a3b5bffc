"""Networks: plain modules, each over any normalization."""

from sinkformer_pl.models.attention_core import AttentionCore
from sinkformer_pl.models.backbone import Backbone, BackboneFactory
from sinkformer_pl.models.blocks import AttentionBlock, TransformerEncoder
from sinkformer_pl.models.multi_head_attention import MultiHeadAttention
from sinkformer_pl.models.point_cloud_transformer import PointCloudTransformer
from sinkformer_pl.models.pooling import PMA
from sinkformer_pl.models.set_transformer import ISAB, SAB, SetTransformer
from sinkformer_pl.models.text_transformer import TextTransformer
from sinkformer_pl.models.tokens import Tokens
from sinkformer_pl.models.vision_transformer import VisionTransformer

__all__ = [
    "ISAB",
    "PMA",
    "SAB",
    "AttentionBlock",
    "AttentionCore",
    "Backbone",
    "BackboneFactory",
    "MultiHeadAttention",
    "PointCloudTransformer",
    "SetTransformer",
    "TextTransformer",
    "Tokens",
    "TransformerEncoder",
    "VisionTransformer",
]
