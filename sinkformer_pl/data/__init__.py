"""Labelled data for the models: sources of images, texts and point clouds, and what a new one builds on."""

from sinkformer_pl.data.classification import ClassificationData, LabelledDataset, Sample, Split, stratified_split
from sinkformer_pl.data.digits import Digits
from sinkformer_pl.data.docstrings import Docstrings
from sinkformer_pl.data.files import PointClouds
from sinkformer_pl.data.image_folder import ImageFolder
from sinkformer_pl.data.images import ImageData, Images, ImageSource
from sinkformer_pl.data.imdb import IMDb
from sinkformer_pl.data.pointclouds import Clouds, PointCloudData, Source
from sinkformer_pl.data.procedural import ProceduralShapes
from sinkformer_pl.data.sampling import Draw, EpochSampler
from sinkformer_pl.data.text_files import TextLines, TextTable
from sinkformer_pl.data.texts import TextData, Texts, TextSource
from sinkformer_pl.data.torchvision_images import CIFAR10, CIFAR100, MNIST, FashionMNIST, OxfordPets
from sinkformer_pl.data.transforms import Augmentation

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
    "ImageSource",
    "Images",
    "LabelledDataset",
    "OxfordPets",
    "PointCloudData",
    "PointClouds",
    "ProceduralShapes",
    "Sample",
    "Source",
    "Split",
    "TextData",
    "TextLines",
    "TextSource",
    "TextTable",
    "Texts",
    "stratified_split",
]
