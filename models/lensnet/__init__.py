"""LensNet: which blocks a Working Context should show in detail, scored as a set.

features   what is known of a candidate before anything is read
net        the set ranker: features and keys of all candidates together into one score each
"""

from models.lensnet.features import FEATURES, CandidateSet
from models.lensnet.net import LensNet, LensNetSpec

__all__ = ["FEATURES", "CandidateSet", "LensNet", "LensNetSpec"]
