"""The nets: two families that are trained here, and graphs of nets that were trained elsewhere.

May know what describes them, and nothing else of `models`.
"""

from models.networks.building import (
    Discriminator,
    Generator,
    TrainedDiscriminator,
    TrainedGenerator,
    build_networks,
)
from models.networks.encoder import Encoder, build_encoder
from models.networks.families import (
    SLOPE,
    ConvDiscriminator,
    ConvGenerator,
    Dropout,
    Maxout,
    MaxoutDiscriminator,
    MLPGenerator,
    ResidualBlock,
    drop,
    fill_fixup,
    fill_uniform,
)
from models.networks.graph import GraphDiscriminator, GraphGenerator, GraphNet

__all__ = [
    "SLOPE",
    "ConvDiscriminator",
    "ConvGenerator",
    "Discriminator",
    "Dropout",
    "Encoder",
    "Generator",
    "GraphDiscriminator",
    "GraphGenerator",
    "GraphNet",
    "MLPGenerator",
    "Maxout",
    "MaxoutDiscriminator",
    "ResidualBlock",
    "TrainedDiscriminator",
    "TrainedGenerator",
    "build_encoder",
    "build_networks",
    "drop",
    "fill_fixup",
    "fill_uniform",
]
