"""Labelled data for the models: sources of point clouds, and what a new source or modality builds on."""

from sinkformer_pl.data.classification import ClassificationData, LabelledDataset, Sample, Split, stratified_split
from sinkformer_pl.data.files import PointClouds
from sinkformer_pl.data.pointclouds import Clouds, PointCloudData, Source
from sinkformer_pl.data.procedural import ProceduralShapes
from sinkformer_pl.data.sampling import Draw, EpochSampler
from sinkformer_pl.data.transforms import Augmentation

__all__ = [
    "Augmentation",
    "ClassificationData",
    "Clouds",
    "Draw",
    "EpochSampler",
    "LabelledDataset",
    "PointCloudData",
    "PointClouds",
    "ProceduralShapes",
    "Sample",
    "Source",
    "Split",
    "stratified_split",
]
