"""A stored matrix: its tensors (`tensor`), where its bits lie (`layout`), what it stands for (`codec`), and the rules that
one from outside must keep (`validate`). No operation stands here."""

from qbert.weight.layout import Layout
from qbert.weight.specs import TensorSpec
from qbert.weight.tensor import Outliers, Weight, plain_specs, stored_specs

__all__ = ["Layout", "Outliers", "TensorSpec", "Weight", "plain_specs", "stored_specs"]
