"""One frozen dataclass per command. A field's docstring is its help on the command line."""

from leanmim.config.base import Config, Logging, Machine, Model, Optimisation, parse_bytes
from leanmim.config.evaluate import Evaluate, Knn, Probe
from leanmim.config.explained import explain
from leanmim.config.pretrain import Pretrain
from leanmim.config.tools import Cost, Export, Plan, Report, Show

__all__ = [
    "Config", "Cost", "Evaluate", "Export", "Knn", "Logging", "Machine", "Model", "Optimisation", "Plan", "Pretrain",
    "Probe", "Report", "Show", "parse_bytes",
]  # fmt: skip

explain(Cost, Export, Knn, Plan, Pretrain, Probe, Report, Show)
