"""One frozen dataclass per command. A field's docstring is its help on the command line."""

from leanmim.config.base import Config, Logging, Machine, Model, Optimisation, parse_bytes
from leanmim.config.compare import Compare, parse_budget
from leanmim.config.embed import Embed
from leanmim.config.evaluate import Evaluate, Evaluator, Knn, Probe
from leanmim.config.explained import explain
from leanmim.config.finetune import Finetune
from leanmim.config.predict import Predict
from leanmim.config.pretrain import Pretrain
from leanmim.config.tools import Cost, Export, Pack, Plan, Publish, Report, Show, Stats

__all__ = [
    "Compare", "Config", "Cost", "Embed", "Evaluate", "Evaluator", "Export", "Finetune", "Knn", "Logging", "Machine", "Model",
    "Optimisation", "Pack", "Plan", "Predict", "Pretrain", "Probe", "Publish", "Report", "Show", "Stats", "parse_budget", "parse_bytes",
]  # fmt: skip

explain(
    Compare, Cost, Embed, Evaluate, Export, Finetune, Knn, Pack, Plan, Predict, Pretrain, Probe, Publish, Report, Show, Stats,
)  # fmt: skip
