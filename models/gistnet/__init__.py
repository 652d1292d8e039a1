"""GistNets: 32 children into m vectors and a routing key, at every level of detail.

    base       GistNet: the interface, masking, routing keys, digests, save and load
    key_head   which tokens count for a routing key, and in which directions
    lead_in    the tokens before a block that its key may reach to
    layers     pooling, adapter and transformer the trainable nets are made of
    controls   constant, last_token, mean, rescaled_mean: what a trained net has to beat
    windowed   embeddings and lower-layer states of the LM, pooled
    block      a small transformer over the 32 tokens alone
    build      build_gistnet: from a configuration, for a language model

Every kind is imported here, because a kind registers itself under its name when its class is made.
"""

from models.gistnet.base import Entries, GistNet, GistNetSpec, GistOutput
from models.gistnet.block import BlockGistNet
from models.gistnet.build import build_gistnet, packaged_gistnet
from models.gistnet.controls import ConstantGistNet, LastTokenGistNet, MeanGistNet, RescaledMeanGistNet
from models.gistnet.windowed import WindowedGistNet

__all__ = [
    "BlockGistNet",
    "ConstantGistNet",
    "Entries",
    "GistNet",
    "GistNetSpec",
    "GistOutput",
    "LastTokenGistNet",
    "MeanGistNet",
    "RescaledMeanGistNet",
    "WindowedGistNet",
    "build_gistnet",
    "packaged_gistnet",
]
