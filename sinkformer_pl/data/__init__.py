"""Labelled data for the models: sources of images, texts and point clouds, and what a new one builds on."""

from sinkformer_pl.batch import Sample
from sinkformer_pl.data.classification import ClassificationData
from sinkformer_pl.data.dataset import LabelledDataset, Split
from sinkformer_pl.data.images.base import ImageData, Images
from sinkformer_pl.data.images.digits import Digits
from sinkformer_pl.data.images.folder import ImageFolder
from sinkformer_pl.data.images.table import ImageTable
from sinkformer_pl.data.images.torchvision_sets import CIFAR10, CIFAR100, MNIST, FashionMNIST, OxfordPets
from sinkformer_pl.data.learnt import Learnt, read_learnt
from sinkformer_pl.data.pointclouds.base import Clouds, PointCloudData
from sinkformer_pl.data.pointclouds.files import PointClouds
from sinkformer_pl.data.pointclouds.procedural import ProceduralShapes
from sinkformer_pl.data.pointclouds.transforms import Augmentation
from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.data.sampling import Draw, EpochSampler
from sinkformer_pl.data.source import Source
from sinkformer_pl.data.splitting import stratified_split
from sinkformer_pl.data.texts.base import TextData, Texts
from sinkformer_pl.data.texts.docstrings import Docstrings
from sinkformer_pl.data.texts.files import TextLines, TextTable
from sinkformer_pl.data.texts.imdb import IMDb

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Augmentation",
    "ClassificationData",
    "Clouds",
    "Digits",
    "Docstrings",
    "Draw",
    "EpochSampler",
    "FashionMNIST",
    "IMDb",
    "ImageData",
    "ImageFolder",
    "ImageTable",
    "Images",
    "LabelledDataset",
    "Learnt",
    "OxfordPets",
    "PointCloudData",
    "PointClouds",
    "Preprocessing",
    "ProceduralShapes",
    "Sample",
    "Source",
    "Split",
    "TextData",
    "TextLines",
    "TextTable",
    "Texts",
    "read_learnt",
    "stratified_split",
]
